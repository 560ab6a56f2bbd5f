"""Nodes that compute in integers, in the general form: any rank, any attribute.

An int32 accumulator, then float32 multipliers, rounding half to even and saturation, exactly as
``edgepipe.quantization.interpreter`` has it. Kernel templates take the common forms before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import te, tirx

from edgepipe.lowering.converters.conv import conv_te, transpose_te, window
from edgepipe.lowering.converters.matmul import matmul_te
from edgepipe.lowering.converters.numeric import round_even
from edgepipe.lowering.converters.op import Expr, Op, at, cast, const, shape_of
from edgepipe.lowering.converters.pool import pool_te
from edgepipe.lowering.converters.reduce import SUM, fold_axes
from edgepipe.lowering.integers.terms import AXES, Integer, integer_of
from edgepipe.quantization import linear_resize

#: int32 accumulator from the TE tensors of a node: (op, what it computes, inputs, constants).
Accumulate = Callable[[Op, Integer, list[Any], list[Any]], Any]


def convert(op: Op) -> Expr:
    """The Relax expression of a node of the integer domain."""
    integer = integer_of(op.node)
    if integer.term.kind == "table":
        return _look_up(op, integer)
    arrays = _constants(op, integer)
    count, inputs = len(op.inputs), [op.tensor(i) for i in range(len(op.inputs))]
    own = len(integer.term.inputs)
    constants = [op.as_tensor(op.const(a)) for a in [*arrays, *_multipliers(integer)]]

    def compute(*tensors: Any) -> Any:
        held = list(tensors[count:])
        accumulator = _accumulate(op, integer, list(tensors[:own]), held[: len(arrays)])
        return _finish(op, integer, accumulator, list(tensors[own:count]), held[len(arrays) :])

    return op.te(compute, *inputs, *constants)


def _constants(op: Op, integer: Integer) -> list[np.ndarray]:
    """Weights (as small as they are) and bias, as far as there are any; or tables."""
    found = []
    term = integer.term
    if term.kind == "resize":
        return linear_resize.tables(op.node)
    if term.weights is not None:
        codes = term.weights.codes
        small = np.abs(codes).max(initial=0) <= 127
        found.append(codes.astype(np.int8 if small else np.int16))
        if term.bias is not None:
            found.append(term.bias.astype(np.int32).reshape(-1))
    return found


def _multipliers(integer: Integer) -> list[np.ndarray]:
    return [np.asarray(m, np.float32) for m in integer.multipliers]


def _centred(x: Any, zero: int) -> Any:
    """TE: code − zero as int32."""
    return te.compute(
        x.shape, lambda *i: cast(x(*i), "int32") - const(zero, "int32"), name="centred"
    )


def _accumulate(op: Op, integer: Integer, inputs: list[Any], constants: list[Any]) -> Any:
    term, node = integer.term, integer.term.node
    x = _centred(inputs[0], term.inputs[0].zero)
    if term.kind == "codes":
        return x
    if term.kind == "multiply":
        other, zero = inputs[1], term.inputs[1].zero
        shape = op.out_shape()
        return te.compute(
            shape,
            lambda *i: at(x, i) * (cast(at(other, i), "int32") - const(zero, "int32")),
            name="product",
        )
    if term.kind == "average":
        return _total(op, x)
    if term.kind == "resize":
        return _interpolated(op, x, constants)
    assert node is not None
    if term.weights is None:
        return matmul_te(x, _centred(inputs[1], term.inputs[1].zero), "int32")
    weights, *bias = constants
    if node.op_type == "Conv":
        win = window(op, shape_of(weights)[2:], shape_of(x)[2:])
        y = conv_te(x, weights, win, op.attr("group", 1), "int32")
    elif node.op_type == "ConvTranspose":
        y = transpose_te(op, x, weights, "int32")
    else:
        if node.op_type == "Gemm" and op.attr("transB", 0):
            w = weights
            k, n = int(w.shape[1]), int(w.shape[0])
            weights = te.compute((k, n), lambda a, b: w(b, a), name="transposed")
        y = matmul_te(x, weights, "int32")
    if not bias:
        return y
    axis = 1 if node.op_type in ("Conv", "ConvTranspose") else len(y.shape) - 1
    return te.compute(y.shape, lambda *i: y(*i) + at(bias[0], [i[axis]]), name="biased")


def _interpolated(op: Op, x: Any, tables: list[Any]) -> Any:
    """TE: float32 between the integers, the width first (``bilinear.interpolate``)."""
    rows, below, columns, right = tables

    def mix(a: Any, b: Any, weight: Any) -> Any:
        return a + _unfused((b - a) * weight)

    def element(n: Any, c: Any, h: Any, w: Any) -> Any:
        def across(row: Any) -> Any:
            a, b = (cast(x(n, c, row, columns(2 * w + i)), "float32") for i in (0, 1))
            return mix(a, b, right(w))

        return mix(across(rows(2 * h)), across(rows(2 * h + 1)), below(h))

    return te.compute(op.out_shape(), element, name="interpolated")


def _total(op: Op, x: Any) -> Any:
    """TE: the sums that an average divides."""
    rank = len(x.shape)
    if op.type == "AveragePool":
        win = window(op, tuple(op.attr("kernel_shape")), shape_of(x)[2:])
        return pool_te(x, win, op.out_shape(), SUM, const(0, "int32"), lambda v: v)
    axes = list(range(2, rank))
    if op.type == "ReduceMean":
        axes = [int(a) % rank for a in op.node.meta[AXES]]
    total = fold_axes(x, axes, SUM, lambda v: v, "total")
    if op.type != "ReduceMean" or op.attr("keepdims", 1):
        return total
    kept = [a for a in range(rank) if a not in axes]

    def element(*index: Any) -> Any:
        where = [0] * rank
        for a, i in zip(kept, index, strict=True):
            where[a] = i
        return total(*where)

    return te.compute(op.out_shape(), element, name="squeezed")


def _finish(
    op: Op, integer: Integer, accumulator: Any, residuals: list[Any], multipliers: list[Any]
) -> Any:
    """TE: scale and add up the addends; round, or leave them as float32."""
    zeros = [codes.zero for codes in integer.residuals]

    def element(*index: Any) -> Any:
        total = _scaled(at(accumulator, index), multipliers[0], index)
        for residual, zero, multiplier in zip(residuals, zeros, multipliers[1:], strict=True):
            value = cast(at(residual, index), "int32") - const(zero, "int32")
            total = total + _scaled(value, multiplier, index)
        return rounded(total, integer, op.out_dtype())

    return te.compute(op.out_shape(), element, name="requantized")


def _scaled(value: Any, multiplier: Any, index: Any) -> Any:
    return _unfused(cast(value, "float32") * at(multiplier, index))


def _unfused(product: Any) -> Any:
    """Keeps the product and the sum behind it from becoming one fused multiply-add."""
    return tirx.call_llvm_pure_intrin("float32", "llvm.arithmetic.fence", product)


def rounded(total: Any, integer: Integer, dtype: str) -> Any:
    """A float32 sum as the node's result."""
    if integer.low > -np.inf:
        total = tirx.max(total, const(integer.low, "float32"))
    if integer.high < np.inf:
        total = tirx.min(total, const(integer.high, "float32"))
    if integer.zero is None:
        return total
    return cast(cast(round_even(total), "int32") + const(integer.zero, "int32"), dtype)


def _look_up(op: Op, integer: Integer) -> Expr:
    table = integer.term.table
    assert table is not None
    lowest = -128 if op.dtype() == "int8" else 0

    def element(index: Any, x: Any, values: Any) -> Any:
        return values(cast(x(*index), "int32") - const(lowest, "int32"))

    return op.compute(op.out_shape(), element, op.tensor(0), op.const(table))
