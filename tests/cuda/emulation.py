"""Runs the CUDA source of kernels on this machine's CPU: the very text that NVRTC compiles."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from kernels.harness import aligned

from edgepipe.codegen.cuda.device import build_source
from edgepipe.kernels.ops import Op
from edgepipe.kernels.template import select
from edgepipe.target import Target

_HEADER = Path(__file__).with_name("emulated.h")


FLAGS = ("-shared", "-fPIC", "-O1", "-w", "-fno-sanitize=all", "-fno-strict-aliasing")


def zig(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "ziglang", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


def to_cpp(text: str) -> tuple[str, dict[str, int]]:
    """CUDA source as C++ with ``run_KERNEL`` functions; how many arguments each kernel takes."""
    kernels = text[text.index('extern "C" __global__') :]
    # Shared memory of the one block that runs; C++ wants alignas first.
    kernels = kernels.replace("__shared__ alignas(64)", "alignas(64) static")
    parameters = dict(
        re.findall(r"__global__ void (?:__launch_bounds__\([\d, ]+\) )?(\w+)\(([^)]*)\);", kernels)
    )
    parts = [f'#include "{_HEADER}"', "#define uint unsigned int", kernels]
    counts = {}
    for name, words in parameters.items():
        types = [re.sub(r"__restrict__.*", "", w).strip() for w in words.split(",")]
        counts[name] = len(types)
        passed = ", ".join(f"({t})a[{i}]" for i, t in enumerate(types))
        parts.append(
            f"static void body_{name}(void **a) {{ {name}({passed}); }}\n"
            f'extern "C" void run_{name}(void **a, int x, int y, int z, int t, unsigned s) {{\n'
            f"  emulated_body = body_{name}; emulated_arguments = a;\n"
            "  for (int i = 0; i < x * y * z; i++) {\n"
            "    blockIdx = {i % x, i / x % y, i / (x * y)}; emulated_block(t, s + i); }\n}"
        )
    return "\n".join(parts), counts


class Emulated:
    """Ops compiled for ``target`` and callable on arrays. ``edit`` may change the source;
    ``settings`` are the knobs of each op where the default rule's are not meant."""

    def __init__(
        self, ops: list[Op], target: Target, folder: Path, edit: Callable[[str], str] = str,
        settings: list[dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.ops, self.chosen = ops, []
        functions = {}
        for i, op in enumerate(ops):
            template, reasons = select(op, target)
            assert template is not None, reasons
            knobs = settings[i] if settings else template.default(op, target)
            self.chosen.append((template, knobs))
            functions[f"k{i}"] = template.emit(op, knobs)
        self.device = build_source(functions, target)
        text, _ = to_cpp(edit(self.device.source))
        (folder / "k.cpp").write_text(text, encoding="utf-8")
        zig(folder, "c++", *FLAGS, "-o", "k.so", "k.cpp")
        self.library = ctypes.CDLL(str(folder / "k.so"))

    def run(self, index: int, inputs, weights, residuals, elements: int, dtype=None, seed: int = 1):
        """The output buffer of op ``index``; floats start as NaN so that a hole shows."""
        template, knobs = self.chosen[index]
        arrays = [*inputs, *template.pack(self.ops[index], knobs, weights), *residuals]
        arrays = [aligned(np.ascontiguousarray(a)) for a in arrays]
        dtype = np.dtype(dtype or "float32")
        out = aligned(np.full(elements, np.nan if dtype.kind == "f" else 77, dtype))
        pointers = (ctypes.c_void_p * (len(arrays) + 1))(*(a.ctypes.data for a in [*arrays, out]))
        for launch in self.device.launches[f"k{index}"]:
            function = getattr(self.library, f"run_{launch.symbol}")
            function(pointers, *launch.blocks, launch.threads[0], seed)
        return out
