"""Softmax and layer normalisation over the last dimension of row-major tensors.

A row is walked in whole vectors. What is idempotent (maximum, stores of values that do not depend
on the output) lets the last vector overlap its neighbour; sums take the rest one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels import math
from edgepipe.kernels.builder import (
    Registers,
    float32,
    kernel,
    load,
    loop,
    minimum,
    parallel,
    splat,
    store,
)
from edgepipe.kernels.ops import LayerNormOp, Op, SoftmaxOp
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, SoftmaxOp | LayerNormOp) else ""


def default(op: SoftmaxOp | LayerNormOp, target: Target) -> Knobs:
    lanes = target.simd.lanes_f32
    while lanes > op.n:
        lanes //= 2
    return {"lanes": lanes}


def pack(
    op: SoftmaxOp | LayerNormOp, knobs: Knobs, arrays: Sequence[np.ndarray]
) -> list[np.ndarray]:
    return [np.ascontiguousarray(a, np.float32) for a in arrays]


class _Row:
    """Vector walks over one row of ``n`` elements at ``base``."""

    def __init__(self, base: Any, n: int, lanes: int) -> None:
        self.base, self.n, self.lanes = base, n, lanes

    def cover(self, visit: Callable[[Any], None]) -> None:
        """Call ``visit(column)`` for vectors that cover the row; the last may overlap."""
        with loop(-(-self.n // self.lanes)) as i:
            visit(minimum(i * self.lanes, self.n - self.lanes))

    def total(self, value: Callable[[Any, int], Any]) -> Any:
        """Sum of ``value(column, lanes)`` over the row, every element once."""
        partial = Registers(1, self.lanes)
        total = Registers(1, 1)
        partial[0] = splat(float32(0), self.lanes)
        with loop(self.n // self.lanes) as i:
            partial[0] = partial[0] + value(i * self.lanes, self.lanes)
        total[0] = float32(0)
        for lane in range(self.lanes):
            total[0] = total[0] + partial.lane(0, lane)
        if self.n % self.lanes:
            with loop(self.n % self.lanes) as i:
                total[0] = total[0] + value(self.n - self.n % self.lanes + i, 1)
        return total


def _softmax(op: SoftmaxOp, lanes: int, source: Any, target: Any) -> None:
    with parallel(op.rows) as r:
        row = _Row(r * op.n, op.n, lanes)
        greatest, peak = Registers(1, lanes), Registers(1, 1)
        greatest[0] = load(source, row.base, lanes)

        def widen(column: Any) -> None:
            greatest[0] = tirx.max(greatest[0], load(source, row.base + column, lanes))

        row.cover(widen)
        peak[0] = greatest.lane(0, 0)
        for lane in range(1, lanes):
            peak[0] = tirx.max(peak[0], greatest.lane(0, lane))

        def exponent(column: Any) -> None:
            shifted = load(source, row.base + column, lanes) - splat(peak[0], lanes)
            store(target, row.base + column, math.exp(shifted, lanes), lanes)

        row.cover(exponent)
        total = row.total(lambda column, width: load(target, row.base + column, width))
        total[0] = float32(1) / total[0]
        # Not idempotent: whole vectors, then the rest.
        with loop(op.n // lanes) as i:
            at = row.base + i * lanes
            store(target, at, load(target, at, lanes) * splat(total[0], lanes), lanes)
        if op.n % lanes:
            with loop(op.n % lanes) as i:
                at = row.base + op.n - op.n % lanes + i
                store(target, at, load(target, at, 1) * total[0], 1)


def _layer_norm(op: LayerNormOp, lanes: int, buffers: Sequence[Any]) -> None:
    source, scale, *bias, target = buffers
    with parallel(op.rows) as r:
        row = _Row(r * op.n, op.n, lanes)
        mean = row.total(lambda column, width: load(source, row.base + column, width))
        mean[0] = mean[0] * float32(1 / op.n)

        def centred(column: Any, width: int) -> Any:
            return load(source, row.base + column, width) - splat(mean[0], width)

        def squared(column: Any, width: int) -> Any:
            return math.bind(centred(column, width), width, lambda c: c * c)

        # And what rounding left (Chan et al. 1983): equal elements are their mean, or √ε shows it.
        mean[0] = mean[0] + row.total(centred)[0] * float32(1 / op.n)
        factor = row.total(squared)
        factor[0] = float32(1) / tirx.sqrt(factor[0] * float32(1 / op.n) + float32(op.epsilon))

        def normalise(column: Any) -> None:
            value = centred(column, lanes) * splat(factor[0], lanes) * load(scale, column, lanes)
            if bias:
                value = value + load(bias[0], column, lanes)
            store(target, row.base + column, value, lanes)

        row.cover(normalise)


def emit(op: SoftmaxOp | LayerNormOp, knobs: Knobs) -> Any:
    lanes, elements = knobs["lanes"], op.rows * op.n
    arguments = [("x", elements, "float32")]
    if isinstance(op, SoftmaxOp):
        arguments.append(("y", elements, "float32"))
        return kernel("softmax", arguments, lambda x, y: _softmax(op, lanes, x, y))
    arguments.append(("scale", op.n, "float32"))
    arguments += [("bias", op.n, "float32")] if op.bias else []
    arguments.append(("y", elements, "float32"))
    return kernel("layer_norm", arguments, lambda *buffers: _layer_norm(op, lanes, buffers))


TEMPLATE = KernelTemplate(name="rows", matches=matches, default=default, emit=emit, pack=pack)
