"""Kernels of many graphs in one module per target, and their plans carried out over it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe import codegen, lowering
from edgepipe.codegen import link
from edgepipe.codegen.plan import ALIGNMENT, Place, Plan
from edgepipe.context import Context
from edgepipe.target import Target
from tests.random_graphs.builder import Array

#: What buffers are filled with before a run, so that what nothing writes shows.
POISON = 0xA5
_PAGE_BYTES = 65536


class OverrunError(Exception):
    """A kernel wrote outside its buffer."""


class Module:
    """Graphs compiled for one target together: linking costs as much as compiling two of them.

    ``add`` may raise UserError; after ``link`` the graphs can run.
    """

    def __init__(self, target: str) -> None:
        self.target = Target.load(target)
        self.plans: dict[str, Plan] = {}
        self._objects: list[bytes] = []
        self._machine: _Native | _Wasm | None = None

    def add(self, name: str, graph: ir.Model, context: Context) -> None:
        """Compile a graph behind all passes."""
        program = lowering.lower(graph, context)
        plan, objects = codegen.generate(program, context, f"g{len(self._objects)}")
        self._objects.append(objects[""])
        self.plans[name] = plan

    def link(self) -> None:
        """Link everything compiled so far, if anything."""
        if not self._objects:
            return
        with tempfile.TemporaryDirectory(prefix="edgepipe-random-") as folder:
            work = Path(folder)
            names = [f"g{i}.o" for i in range(len(self._objects))]
            for file, content in zip(names, self._objects, strict=True):
                (work / file).write_bytes(content)
            (work / "libmath.a").write_bytes(link.math_library(self.target))
            machine = _Wasm if self.target.kind == "wasm" else _Native
            self._machine = machine(work, [*names, "libmath.a"])

    def run(self, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
        """Outputs of one graph by name."""
        assert self._machine is not None
        plan, machine = self.plans[name], self._machine
        sizes = [_bytes(s.shape, s.dtype) for s in (*plan.inputs, *plan.outputs)]
        machine.reserve([plan.arena_bytes, len(plan.weights), *sizes])
        machine.write(1, bytes(plan.weights))
        for index, spec in enumerate(plan.inputs):
            machine.write(2 + index, np.ascontiguousarray(inputs[spec.name]).tobytes())
        first_output = 2 + len(plan.inputs)
        buffers = {"arena": 0, "weights": 1, "input": 2, "output": first_output}

        def address(place: Place) -> int:
            shift = place.index if place.space in ("input", "output") else 0
            return machine.address(buffers[place.space] + shift) + place.offset

        for call in plan.calls:
            turns = [0] if call.warmed else []
            machine.call(call.symbol, [address(place) for place in call.arguments], turns)
        whole = [machine.read(i, _room(size)) for i, size in enumerate(machine.sizes)]
        for content, size in zip(whole, machine.sizes, strict=True):
            if content[size:].strip(bytes([POISON])):
                raise OverrunError(f"{name}: something is written behind the end of a buffer")
        results = zip(plan.outputs, whole[first_output:], strict=True)
        return {
            spec.name: np.frombuffer(content[: _bytes(spec.shape, spec.dtype)], spec.dtype).reshape(
                spec.shape
            )
            for spec, content in results
        }


def _bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def _room(size: int) -> int:
    """A buffer's bytes with those behind it that nothing may write."""
    return -(-size // ALIGNMENT) * ALIGNMENT + ALIGNMENT


class _Native:
    """A shared library of this machine over ctypes."""

    def __init__(self, work: Path, files: list[str]) -> None:
        import ctypes

        link.zig("ld.lld", "-shared", "-z", "defs", "-o", "kernels.so", *files, cwd=work)
        self._ctypes, self._library = ctypes, ctypes.CDLL(str(work / "kernels.so"))

    def reserve(self, sizes: list[int]) -> None:
        self.sizes, self._buffers = sizes, []
        for size in sizes:
            raw = np.full(_room(size) + ALIGNMENT, POISON, np.uint8)
            start = -raw.ctypes.data % ALIGNMENT
            self._buffers.append(raw[start : start + _room(size)])

    def write(self, buffer: int, content: bytes) -> None:
        self._buffers[buffer][: len(content)] = np.frombuffer(content, np.uint8)

    def read(self, buffer: int, size: int) -> bytes:
        return self._buffers[buffer][:size].tobytes()

    def address(self, buffer: int) -> int:
        return int(self._buffers[buffer].ctypes.data)

    def call(self, symbol: str, arguments: list[int], turns: list[int]) -> None:
        getattr(self._library, symbol)(*map(self._ctypes.c_void_p, arguments), *turns)


class _Wasm:
    """A WebAssembly module in wasmtime."""

    def __init__(self, work: Path, files: list[str]) -> None:
        import wasmtime

        link.zig("wasm-ld", "--no-entry", "--stack-first", "--export-all", "-z",
                 f"stack-size={_PAGE_BYTES}", "-o", "kernels.wasm", *files, cwd=work)  # fmt: skip
        config = wasmtime.Config()
        config.wasm_simd = True
        self._store = wasmtime.Store(wasmtime.Engine(config))
        module = wasmtime.Module.from_file(self._store.engine, str(work / "kernels.wasm"))
        instance: Any = wasmtime.Instance(self._store, module, [])
        self._exports = instance.exports(self._store)
        self._memory = self._exports["memory"]

    def reserve(self, sizes: list[int]) -> None:
        end = _room(int(self._exports["__heap_base"].value(self._store)))
        self.sizes, self._starts = sizes, []
        for size in sizes:
            self._starts.append(end)
            end += _room(size)
        missing = end - self._memory.data_len(self._store)
        if missing > 0:
            self._memory.grow(self._store, -(-missing // _PAGE_BYTES))
        first = self._starts[0]
        self._memory.write(self._store, bytes([POISON]) * (end - first), first)

    def write(self, buffer: int, content: bytes) -> None:
        self._memory.write(self._store, content, self._starts[buffer])

    def read(self, buffer: int, size: int) -> bytes:
        start = self._starts[buffer]
        return bytes(self._memory.read(self._store, start, start + size))

    def address(self, buffer: int) -> int:
        return self._starts[buffer]

    def call(self, symbol: str, arguments: list[int], turns: list[int]) -> None:
        self._exports[symbol](self._store, *arguments, *turns)
