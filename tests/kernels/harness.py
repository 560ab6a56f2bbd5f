"""Builds kernels for this machine and calls them on NumPy arrays."""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.codegen import link
from edgepipe.codegen.plan import ALIGNMENT
from edgepipe.codegen.primfunc import build_object
from edgepipe.kernels.ops import Op
from edgepipe.kernels.template import KernelTemplate, select
from edgepipe.runners import qemu
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
        self.folder = folder
        self.build(functions)

    def build(self, functions: dict[str, Any]) -> None:
        """Compile ``functions`` by their symbols."""
        blob, self.workspaces = build_object(functions, Target.load("host"), pieces=self.pieces)
        (self.folder / "k.o").write_bytes(blob)
        command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-o", "k.so", "k.o"]
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)
        self.library = ctypes.CDLL(str(self.folder / "k.so"))

    def call(self, index: int, arrays: list[np.ndarray], own: list[np.ndarray], parts: int) -> None:
        """Call kernel ``index`` on ``arrays`` in place: each of ``parts``, the last one first.

        ``own`` is memory of a thread's own: no part finds in it what another one left.
        """
        function = getattr(self.library, f"k{index}")
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*arrays, *own)]
        if self.pieces.get(f"k{index}", 1) == 1:
            _forget(own)
            function(*pointers)
            return
        for part in reversed(range(parts)):
            _forget(own)
            function(*pointers, part, parts)

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
        for out, parts in zip(grown, (1, PARTS), strict=True):
            self.call(index, [*arrays, out, *scratch], own, parts)
            if self.pieces.get(f"k{index}", 1) == 1:
                break
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


class Emulated(Kernels):
    """The same for a target whose programs QEMU runs: the kernels in one of them, which takes
    their buffers from its input and writes them to its output."""

    def __init__(
        self, ops: list[Op], target: Target, folder: Path,
        settings: list[dict[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self.target = target
        super().__init__(ops, target, folder, settings)

    def build(self, functions: dict[str, Any]) -> None:
        blob, self.workspaces = build_object(functions, self.target, pieces=self.pieces)
        (self.folder / "k.o").write_bytes(blob)
        cases, declared = [], []
        for symbol, function in functions.items():
            pointers = ["void *"] * (len(function.params) + len(self.workspaces[symbol]))
            given = [f"b[{i}]" for i in range(len(pointers))]
            if self.pieces.get(symbol, 1) > 1:
                pointers, given = [*pointers, "int", "int"], [*given, "part", "parts"]
            declared.append(f"void {symbol}({', '.join(pointers)});")
            cases.append(f"case {symbol[1:]}: {symbol}({', '.join(given)}); break;")
        main = _MAIN.replace("DECLARED", "\n".join(declared)).replace("CASES", "\n".join(cases))
        (self.folder / "main.c").write_text(main)
        triple = self.target.link.static_zig_target
        command = [sys.executable, "-m", "ziglang", "cc", "-target", triple, "-static", "-O1",
                   "-o", "k", "main.c", "k.o"]  # fmt: skip
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)

    def call(self, index: int, arrays: list[np.ndarray], own: list[np.ndarray], parts: int) -> None:
        _forget(own)
        arrays = [*arrays, *own]
        count = 1 if self.pieces.get(f"k{index}", 1) == 1 else parts
        given = b"".join(np.uint64(a.nbytes).tobytes() + a.tobytes() for a in arrays)
        words = [*qemu.command(self.target), str(self.folder / "k"), str(index), str(count)]
        said = subprocess.run(words, input=given, check=True, capture_output=True).stdout
        for array in arrays:
            got, said = said[: array.nbytes], said[array.nbytes :]
            array[...] = np.frombuffer(got, array.dtype).reshape(array.shape)
        assert not said


def wasm_store(arm: bool) -> Any:
    """Where relaxed instructions give what they give on this processor, or on Arm."""
    import wasmtime

    config = wasmtime.Config()
    config.wasm_relaxed_simd = True
    config.wasm_relaxed_simd_deterministic = arm
    return wasmtime.Store(wasmtime.Engine(config))


class InWasmtime(Kernels):
    """The same for WebAssembly: in the form of ``variant``, over weights as the plain one has them.

    Kernels are called in one instance, whose memory holds a call's buffers at a time. Relaxed
    instructions are this processor's, or with ``arm`` give what they give on Arm.
    """

    def __init__(
        self, ops: list[Op], target: Target, variant: str, folder: Path,
        settings: list[dict[str, Any]] | None = None, arm: bool = False,
    ) -> None:  # fmt: skip
        self.target, self.variant, self.arm = target, variant, arm
        super().__init__(ops, target, folder, settings)

    def build(self, functions: dict[str, Any]) -> None:
        import wasmtime

        self.pieces = {}
        for i, op in enumerate(self.ops):
            template, knobs = self.templates[i], self.knobs[i]
            other = template.variant(op, knobs, self.variant) if self.variant else None
            if other is not None:
                functions[f"k{i}"] = template.emit(op, other)
        attributes = self.target.variants[self.variant] if self.variant else ()
        blob, self.workspaces = build_object(functions, self.target, attributes)
        (self.folder / "k.o").write_bytes(blob)
        (self.folder / "math.a").write_bytes(link.math_library(self.target))
        link.zig("wasm-ld", "--no-entry", *(f"--export={name}" for name in functions),
                 "--export=__heap_base", "-o", "k.wasm", "k.o", "math.a",
                 cwd=self.folder)  # fmt: skip
        self.store = wasm_store(self.arm)
        module = wasmtime.Module.from_file(self.store.engine, str(self.folder / "k.wasm"))
        self.exports = wasmtime.Instance(self.store, module, []).exports(self.store)

    def call(self, index: int, arrays: list[np.ndarray], own: list[np.ndarray], parts: int) -> None:
        _forget(own)
        at, places = int(self.exports["__heap_base"].value(self.store)), []
        for array in (*arrays, *own):
            places.append(-(-at // 64) * 64)
            at = places[-1] + array.nbytes
        memory = self.exports["memory"]
        memory.grow(self.store, max(0, -(-(at - memory.data_len(self.store)) // 65536)))
        for array, place in zip((*arrays, *own), places, strict=True):
            memory.write(self.store, array.tobytes(), place)
        self.exports[f"k{index}"](self.store, *places)
        for array, place in zip((*arrays, *own), places, strict=True):
            got = memory.read(self.store, place, place + array.nbytes)
            array[...] = np.frombuffer(got, array.dtype).reshape(array.shape)


#: Reads the buffers (bytes, then as many of them), calls a kernel's parts, writes the buffers.
_MAIN = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
DECLARED
int main(int argc, char **argv) {
    static void *b[64];
    static uint64_t sizes[64];
    int count = 0, index = atoi(argv[1]), parts = atoi(argv[2]);
    while (fread(&sizes[count], 8, 1, stdin) == 1) {
        b[count] = aligned_alloc(64, (sizes[count] + 127) / 64 * 64);
        if (fread(b[count], 1, sizes[count], stdin) != sizes[count]) return 1;
        count++;
    }
    for (int part = parts - 1; part >= 0; part--) switch (index) {
CASES
    }
    for (int i = 0; i < count; i++) fwrite(b[i], 1, sizes[i], stdout);
    return argc != 3;
}
"""


def snr_db(reference: np.ndarray, got: np.ndarray) -> float:
    """10 log10 of signal over error power, in float64."""
    reference = reference.astype(np.float64)
    noise = float(np.sum((reference - got.astype(np.float64)) ** 2))
    signal = float(np.sum(reference**2))
    return float("inf") if noise == 0 else 10 * np.log10(signal / noise)
