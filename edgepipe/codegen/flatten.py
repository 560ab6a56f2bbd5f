"""The Relax main function as a Plan: calls in order, every argument with its place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import tvm
from tvm import relax

from edgepipe.blob import Blob
from edgepipe.codegen.memory import Lifetime, align, peak_live, plan
from edgepipe.codegen.plan import (
    ALIGNMENT,
    MOST_THREADS,
    ArenaTensor,
    Call,
    GpuCode,
    KernelAudit,
    Place,
    Plan,
    TensorSpec,
)
from edgepipe.kernels.builder import kernel, load, loop, store
from edgepipe.lowering import Program

#: What a core does in the time in which threads find one another, twice over: some microseconds.
LEAST_SHARED_MACS = 200_000
LEAST_SHARED_BYTES = 1 << 16
#: Multiply-adds from which slow code takes a noticeable part of the first inference.
LEAST_WARMED_MACS = 1_000_000


@dataclass(eq=False)
class Buffer:
    """A tensor with a place of its own: an input, an output, a constant or a piece of arena.

    ``scratch``: nobody else reads what a kernel writes there. ``stride`` above 0: every thread has
    so many bytes of it for itself.
    """

    size: int
    place: Place | None = None
    first: int = -1
    last: int = -1
    scratch: bool = False
    stride: int = 0


@dataclass(frozen=True)
class RawCall:
    """A call before memory planning."""

    function: str
    arguments: tuple[Buffer, ...]


def _type_bytes(type_: Any) -> int:
    count = 1
    for extent in type_.shape:
        count *= int(extent)
    dtype = str(type_.dtype)
    return count * (1 if dtype == "bool" else np.dtype(dtype).itemsize)


class _Weights:
    """The weights: every tensor aligned, equal tensors stored once, each where TVM has it."""

    def __init__(self) -> None:
        self.size = 0
        self.pieces: list[bytes | memoryview] = []
        self.known: dict[bytes, Buffer] = {}

    def add(self, tensor: Any) -> Buffer:
        data = np.from_dlpack(tensor).reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(data).digest()
        if digest not in self.known:
            start = align(self.size)
            self.known[digest] = Buffer(len(data), Place("weights", start))
            self.pieces += [bytes(start - self.size), data]
            self.size = start + len(data)
        return self.known[digest]


class Flattener:
    """Reads ``main`` once. ``calls`` name PrimFuncs; ``copies`` are functions it had to add."""

    def __init__(self, program: Program, gpu: bool = False) -> None:
        self.program, self.copy = program, _gpu_copy if gpu else _copy
        self.weights = _Weights()
        self.calls: list[RawCall] = []
        self.copies: dict[str, Any] = {}
        self.values: dict[Any, Any] = {}  # relax var → Buffer, or a list of them for a tuple
        main = program.module["main"]
        self.inputs = [
            self._spec(n, v.ty) for n, v in zip(program.inputs, main.params, strict=True)
        ]
        for i, param in enumerate(main.params):
            self.values[param] = Buffer(_type_bytes(param.ty), Place("input", index=i))
        result = main.body.body
        for block in main.body.blocks:
            for binding in block.bindings:
                self.values[binding.var] = self._bind(binding.value)
        results = self._value(result)
        types = result.ty.fields if isinstance(results, list) else [result.ty]
        results = results if isinstance(results, list) else [results]
        self.outputs = [self._spec(n, t) for n, t in zip(program.outputs, types, strict=True)]
        for i, (buffer, type_) in enumerate(zip(results, types, strict=True)):
            self._output(i, buffer, type_)

    @staticmethod
    def _spec(name: str, type_: Any) -> TensorSpec:
        return TensorSpec(name, tuple(int(d) for d in type_.shape), str(type_.dtype))

    def _value(self, expr: Any) -> Any:
        if isinstance(expr, tvm.ir.GenericConst):
            return self.weights.add(expr.value)
        if isinstance(expr, relax.Tuple):
            return [self._value(f) for f in expr.fields]
        return self.values[expr]

    def _bind(self, value: Any) -> Any:
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        if not isinstance(value, relax.Call):
            return self._value(value)
        name = getattr(value.op, "name", "")
        if name == "relax.reshape":
            return self._value(value.args[0])
        if name != "relax.call_tir":
            raise NotImplementedError(f"{name} in the lowered program")
        function, arguments = value.args[0], value.args[1]
        types = value.ty.fields if hasattr(value.ty, "fields") else [value.ty]
        template = self._is_template(function)
        results = [Buffer(_type_bytes(t), scratch=template and i > 0) for i, t in enumerate(types)]
        sources = self._value(arguments)
        self._call(function.name_hint, [*sources, *results])
        return results if hasattr(value.ty, "fields") else results[0]

    def _is_template(self, function: Any) -> bool:
        attrs = self.program.module[function].attrs
        return attrs is not None and "edgepipe.template" in attrs

    def _call(self, function: str, arguments: list[Buffer]) -> None:
        for buffer in arguments:
            if buffer.first < 0:
                buffer.first = len(self.calls)
            buffer.last = len(self.calls)
        self.calls.append(RawCall(function, tuple(arguments)))

    def _output(self, index: int, buffer: Buffer, type_: Any) -> None:
        """Let the kernel that computes an output write it there; copy what nobody computes."""
        if buffer.place is None:
            buffer.place = Place("output", index=index)
            return
        size = _type_bytes(type_)
        name = f"copy_{size}"
        self.copies[name] = self.copy(name, size)
        self._call(name, [buffer, Buffer(size, Place("output", index=index))])

    def worth_sharing(self) -> set[str]:
        """The functions with so much work that waiting for other threads costs less."""
        worth = set()
        for call in self.calls:
            moved = sum(b.size for b in call.arguments)
            if self._macs(call) >= LEAST_SHARED_MACS or moved >= LEAST_SHARED_BYTES:
                worth.add(call.function)
        return worth

    def worth_warming(self) -> set[str]:
        """The functions of which slow code would take much of the first inference."""
        return {call.function for call in self.calls if self._macs(call) >= LEAST_WARMED_MACS}

    def _macs(self, call: RawCall) -> int:
        return max((a.macs for a in self.program.audits.get(call.function, ())), default=0)

    def plan(
        self,
        symbols: Mapping[str, str],
        workspaces: Mapping[str, list[int]],
        gpu: GpuCode | None = None,
        pieces: Mapping[str, int] = MappingProxyType({}),
        threads: int = 1,
        warmed: frozenset[str] = frozenset(),
    ) -> Plan:
        """Place everything. ``symbols`` maps function names to C symbols; ``workspaces`` gives the
        bytes of the extra pointers each symbol takes, ``pieces`` those that ``threads`` share;
        ``warmed`` symbols can be warmed up."""
        calls = []
        tensors: list[Buffer] = []
        for at, call in enumerate(self.calls):
            extra = [
                Buffer(size, None, at, at, scratch=True)
                for size in workspaces.get(symbols[call.function], [])
            ]
            arguments = [*call.arguments, *extra]
            if pieces.get(symbols[call.function], 1) > 1:
                for own in (b for b in arguments if b.scratch):
                    own.stride = align(own.size)
                    own.size = own.stride * (threads or MOST_THREADS)
            tensors += [b for b in arguments if b.place is None and b.first == at]
            calls.append(RawCall(call.function, tuple(arguments)))
        lifetimes = [Lifetime(b.size, b.first, b.last) for b in tensors]
        offsets, arena_bytes = plan(lifetimes)
        if any(call.function.startswith("q_") for call in calls):
            arena_bytes += ALIGNMENT  # integer kernels read on, up to a vector, and ignore it
        for buffer, offset in zip(tensors, offsets, strict=True):
            buffer.place = Place("arena", offset)
        audits = {name: list(entries) for name, entries in self.program.audits.items()}
        return Plan(
            inputs=tuple(self.inputs),
            outputs=tuple(self.outputs),
            calls=tuple(
                Call(
                    symbols[c.function],
                    tuple(_placed(b) for b in c.arguments),
                    c.function,
                    pieces.get(symbols[c.function], 1),
                    tuple(b.stride for b in c.arguments),
                    symbols[c.function] in warmed,
                )
                for c in calls
            ),
            arena_bytes=arena_bytes,
            peak_live_bytes=peak_live(lifetimes),
            weights=Blob(tuple(self.weights.pieces)),
            audit=tuple(
                replace(
                    _with_traffic(_audit(c, audits, self.program.tuned), c),
                    pieces=pieces.get(symbols[c.function], 1),
                )
                for c in calls
            ),
            arena=tuple(
                ArenaTensor(offset, t.size, t.first, t.last)
                for offset, t in zip(offsets, lifetimes, strict=True)
            ),
            gpu=gpu,
            threads=threads,
        )


def _placed(buffer: Buffer) -> Place:
    assert buffer.place is not None
    return buffer.place


def _with_traffic(audit: KernelAudit, call: RawCall) -> KernelAudit:
    """With the bytes of the call's tensors. What is in the arena for it alone is scratch."""
    weights = activations = 0
    for buffer in dict.fromkeys(call.arguments):
        space = _placed(buffer).space
        if space == "weights":
            weights += buffer.size
        elif space != "arena" or buffer.first != buffer.last:
            activations += buffer.size
    return replace(audit, weight_bytes=weights, activation_bytes=activations)


def _audit(
    call: RawCall, audits: dict[str, list[KernelAudit]], tuned: dict[str, str]
) -> KernelAudit:
    entries = audits.get(call.function)
    if entries:
        return entries.pop(0)
    integer = "integer_" in call.function
    return KernelAudit(
        op=call.function,
        op_type="generic",
        kernel=call.function,
        arithmetic="int8" if integer else "as in the model",
        accumulator="int32" if integer else "as in the model",
        macs=0,
        tuned=tuned.get(call.function, ""),
    )


def _gpu_copy(name: str, size: int) -> Any:
    from edgepipe.kernels.cuda.threads import parallel

    def body(source: Any, target: Any) -> None:
        with parallel(size) as i:
            store(target, i, load(source, i, 1), 1)

    return kernel(name, [("x", size, "uint8"), ("y", size, "uint8")], body)


def _copy(name: str, size: int) -> Any:
    def body(source: Any, target: Any) -> None:
        with loop(size) as i:
            store(target, i, load(source, i, 1), 1)

    return kernel(name, [("x", size, "uint8"), ("y", size, "uint8")], body)
