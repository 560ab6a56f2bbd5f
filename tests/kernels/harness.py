"""Builds kernels for this machine and calls them on NumPy arrays."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.codegen.plan import ALIGNMENT
from edgepipe.codegen.primfunc import build_object
from edgepipe.kernels.ops import Op
from edgepipe.kernels.template import KernelTemplate, select
from edgepipe.target import Simd, Target

#: float32 accumulation over up to a few thousand terms against float64.
FLOOR_DB = 110.0
#: Threads that share a kernel: no divisor of most extents, more than some have pieces.
PARTS = 5
#: Elements behind an output that must stay as they are.
BEHIND = 64


def target_with(lanes: int, registers: int) -> Target:
    """This machine, as if its vectors had ``lanes`` float32 lanes: every tile shape runs here."""
    return dataclasses.replace(Target.load("host"), simd=Simd(lanes, registers, True))


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy whose first byte is aligned as in an arena."""
    raw = np.zeros(array.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    view = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


class Kernels:
    """A set of ops compiled into one shared library, every other one for several threads.

    ``settings`` are the knobs of each, where the default rule's are not meant.
    """

    def __init__(
        self,
        ops: list[Op],
        target: Target,
        folder: Path,
        settings: list[dict[str, Any]] | None = None,
        **overrides: Any,
    ) -> None:
        self.templates: list[KernelTemplate] = []
        self.knobs: list[dict[str, Any]] = []
        functions = {}
        self.ops = ops
        for i, op in enumerate(ops):
            template, reasons = select(op, target)
            assert template is not None, reasons
            chosen = template.default(op, target) if settings is None else settings[i]
            knobs = {**chosen, **overrides}
            self.templates.append(template)
            self.knobs.append(knobs)
            functions[f"k{i}"] = template.emit(op, knobs)
        self.pieces = {f"k{i}": 1 for i in range(1, len(ops), 2)}
        blob, self.workspaces = build_object(functions, Target.load("host"), pieces=self.pieces)
        (folder / "k.o").write_bytes(blob)
        command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-o", "k.so", "k.o"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        self.library = ctypes.CDLL(str(folder / "k.so"))

    def run(
        self,
        index: int,
        inputs: list[np.ndarray],
        weights: list[np.ndarray],
        residuals: list[np.ndarray],
        elements: int,
        dtype: str = "float32",
    ) -> np.ndarray:
        """Call kernel ``index``; a float output starts as NaN so that a hole shows, and what lies
        behind it must stay. Parts of it, the last one first, must come to the same bits."""
        packed = self.templates[index].pack(self.ops[index], self.knobs[index], weights)
        arrays = [aligned(a) for a in [*inputs, *packed, *residuals]]
        hole = np.nan if dtype == "float32" else 77
        grown = [aligned(np.full(elements + BEHIND, hole, dtype)) for _ in range(2)]
        outs = [out[:elements] for out in grown]
        sizes = self.templates[index].scratch(self.ops[index], self.knobs[index])
        scratch = [aligned(np.full(size, -1, np.int32)) for size in sizes]
        own = [aligned(np.zeros(size, np.uint8)) for size in self.workspaces[f"k{index}"]]
        function = getattr(self.library, f"k{index}")
        for out, parts in zip(outs, (1, PARTS), strict=True):
            pointers = [ctypes.c_void_p(a.ctypes.data) for a in [*arrays, out, *scratch, *own]]
            if self.pieces.get(f"k{index}", 1) == 1:
                _forget(own)
                function(*pointers)
                break
            for part in reversed(range(parts)):
                _forget(own)  # another thread has others
                function(*pointers, part, parts)
        for out in grown:
            assert np.array_equal(out[elements:], np.full(BEHIND, hole, dtype), equal_nan=True)
        if self.pieces.get(f"k{index}", 1) == 1:
            return outs[0]
        assert outs[0].tobytes() == outs[1].tobytes(), f"parts differ: {self.ops[index]}"
        return outs[0]


def _forget(workspaces: list[np.ndarray]) -> None:
    """Every float becomes NaN."""
    for held in workspaces:
        held.fill(255)


def snr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """10 log10 of signal over error power, in float64."""
    reference = reference.astype(np.float64)
    noise = float(np.sum((reference - got.astype(np.float64)) ** 2))
    signal = float(np.sum(reference**2))
    return float("inf") if noise == 0 else 10 * np.log10(signal / noise)
