"""Reductions by one block of threads each: softmax, layer normalisation, global pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import math
from edgepipe.kernels.builder import Registers, float32, kernel, load, splat, store
from edgepipe.kernels.cuda.threads import (
    THREADS,
    barrier,
    finish,
    launch,
    read,
    reduced,
    shared,
    when,
    write,
)
from edgepipe.kernels.ops import GlobalPoolOp, LayerNormOp, Op, SoftmaxOp
from edgepipe.kernels.output import signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

_Op = SoftmaxOp | LayerNormOp | GlobalPoolOp


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, _Op) else ""


def default(op: _Op, target: Target) -> Knobs:
    return {}


def pack(op: _Op, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.ascontiguousarray(a, np.float32) for a in arrays]


def _strided(count: int, thread: Any, visit: Callable[[Any], None]) -> None:
    """``visit(i)`` for ``0 .. count - 1``, THREADS apart."""
    with T.serial(0, -(-count // THREADS)) as turn:
        i = turn * THREADS + thread
        with when(True if count % THREADS == 0 else i < count):
            visit(i)


def _gather(
    memory: Any, thread: Any, count: int, start: float, value: Callable[[Any], Any],
    combine: Callable[[Any, Any], Any],
) -> Any:  # fmt: skip
    """Combine ``value(i)`` over ``count`` elements; every thread gets the result."""
    own, result = Registers(1, 1), Registers(1, 1)
    own[0] = float32(start)

    def visit(i: Any) -> None:
        own[0] = combine(own[0], value(i))

    _strided(count, thread, visit)
    store(memory, thread, own[0], 1)
    result[0] = reduced(memory, thread, THREADS, combine)
    barrier()
    return result[0]


def _add(a: Any, b: Any) -> Any:
    return a + b


def _softmax(op: SoftmaxOp, x: Any, y: Any) -> None:
    """Exponents are computed twice rather than kept: what is stored may be a half."""
    with launch((op.rows,), THREADS) as (row, _, _, thread):
        memory, base = shared(THREADS), row * op.n
        peak = _gather(memory, thread, op.n, -3.4e38, lambda i: read(x, base + i, 1), tirx.max)

        def exponent(i: Any) -> Any:
            return math.exp(read(x, base + i, 1) - peak, 1)

        total = _gather(memory, thread, op.n, 0, exponent, _add)
        _strided(op.n, thread, lambda i: write(y, base + i, exponent(i) / total, 1))


def _layer_norm(op: LayerNormOp, buffers: Sequence[Any]) -> None:
    source, scale, *bias, y = buffers
    with launch((op.rows,), THREADS) as (row, _, _, thread):
        memory, base, factor = shared(THREADS), row * op.n, float32(1 / op.n)
        mean, inverse = Registers(1, 1), Registers(1, 1)

        def x(i: Any) -> Any:
            return read(source, base + i, 1)

        def centred(i: Any) -> Any:
            return x(i) - mean[0]

        def squared(i: Any) -> Any:
            return centred(i) * centred(i)

        mean[0] = _gather(memory, thread, op.n, 0, x, _add) * factor
        # And what rounding left (Chan et al. 1983): equal elements are their mean, or √ε shows it.
        mean[0] = mean[0] + _gather(memory, thread, op.n, 0, centred, _add) * factor
        variance = _gather(memory, thread, op.n, 0, squared, _add) * factor
        inverse[0] = float32(1) / tirx.sqrt(variance + float32(op.epsilon))

        def normalise(i: Any) -> None:
            value = centred(i) * inverse[0] * scale[i]
            write(y, base + i, value + bias[0][i] if bias else value, 1)

        _strided(op.n, thread, normalise)


def _global_pool(op: GlobalPoolOp, buffers: Sequence[Any]) -> None:
    source, *residuals, target = buffers
    x, lanes = op.x, op.y.lanes
    combine = tirx.max if op.kind == "max" else _add
    with launch((op.y.blocks, op.y.n), THREADS) as (block, n, _, thread):
        memory, result = shared(THREADS), Registers(1, lanes)
        for lane in range(lanes):

            def value(i: Any, lane: int = lane) -> Any:
                return read(source, x.offset(n, block, i // x.w, i % x.w) + lane, 1)

            start = -3.4e38 if op.kind == "max" else 0
            total = _gather(memory, thread, x.h * x.w, start, value, combine)
            store(result.buffer, lane, total, 1)
        with when(thread < 1):
            vector = load(result.buffer, 0, lanes)
            if op.kind == "average":
                vector = vector * splat(float32(1 / (x.h * x.w)), lanes)
            finish(op, residuals, target, (n, block, 0, 0), vector)


def emit(op: _Op, knobs: Knobs) -> Any:
    if isinstance(op, GlobalPoolOp):
        name = f"global_{op.kind}_pool"
        inputs = signature(op, [("x", op.x.elements, op.x.dtype)])
        return kernel(name, inputs, lambda *buffers: _global_pool(op, buffers))
    elements = op.rows * op.n
    arguments = [("x", elements, op.x_dtype)]
    if isinstance(op, SoftmaxOp):
        arguments.append(("y", elements, op.y_dtype))
        return kernel("softmax", arguments, lambda x, y: _softmax(op, x, y))
    arguments.append(("scale", op.n, "float32"))
    arguments += [("bias", op.n, "float32")] if op.bias else []
    arguments.append(("y", elements, op.y_dtype))
    return kernel("layer_norm", arguments, lambda *buffers: _layer_norm(op, buffers))


TEMPLATE = KernelTemplate(name="rows", matches=matches, default=default, emit=emit, pack=pack)
