"""Quantised operators with ONNX semantics: integer accumulation, float32 scales, half to even."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import te, tirx

from edgepipe.errors import UserError
from edgepipe.lowering.converters.conv import conv_te, window
from edgepipe.lowering.converters.matmul import matmul_te
from edgepipe.lowering.converters.numeric import round_even, saturate
from edgepipe.lowering.converters.op import Expr, Op, at, axis_of, cast, const, shape_of
from edgepipe.lowering.converters.reduce import MAX, MIN, fold_axes
from edgepipe.lowering.converters.registry import converts

_INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")


def _parameter(op: Op, i: int, axis: int, block: int) -> Any:
    """Reader (index) → scale or zero point: per tensor, per axis or blocked along ``axis``."""
    if not op.has(i):
        return lambda tensor, index: None
    shape, rank = op.shape(i), len(op.shape())

    def read(tensor: Any, index: Any) -> Any:
        if len(shape) <= 1 and int(np.prod(shape)) == 1:
            return at(tensor, [0] * max(len(tensor.shape), 1))
        if len(shape) == 1:
            return tensor(index[axis])
        where = list(index)
        if block or shape[axis] != op.shape()[axis]:
            size = block or -(-op.shape()[axis] // shape[axis])
            where[axis] = index[axis] // size
        return tensor(*[0 if shape[a] == 1 else where[a] for a in range(rank)])

    return read


@converts("QuantizeLinear")
def _quantize(op: Op) -> Expr:
    dtype, rank = op.out_dtype(), len(op.shape())
    if dtype not in _INTEGERS:
        raise op.unsupported(f"quantisation to {dtype}")
    axis = axis_of(op.attr("axis", 1), max(rank, 1))
    block = op.attr("block_size", 0)
    scale_at, zero_at = (_parameter(op, i, axis, block) for i in (1, 2))

    def element(index: Any, x: Any, scale: Any, zero: Any) -> Any:
        value = cast(x(*index), "float32") / cast(scale_at(scale, index), "float32")
        rounded = round_even(value)
        offset = zero_at(zero, index)
        if offset is not None:
            rounded = rounded + cast(offset, "float32")
        return saturate(rounded, dtype)

    zero = op.inputs[2] if op.has(2) else None
    return op.compute(op.out_shape(), element, op.tensor(0), op.inputs[1], zero)


@converts("DequantizeLinear")
def _dequantize(op: Op) -> Expr:
    dtype, rank = op.out_dtype(), len(op.shape())
    axis = axis_of(op.attr("axis", 1), max(rank, 1))
    block = op.attr("block_size", 0)
    scale_at, zero_at = (_parameter(op, i, axis, block) for i in (1, 2))

    def element(index: Any, x: Any, scale: Any, zero: Any) -> Any:
        value = cast(x(*index), "int32")
        offset = zero_at(zero, index)
        if offset is not None:
            value = value - cast(offset, "int32")
        return cast(cast(value, "float32") * cast(scale_at(scale, index), "float32"), dtype)

    zero = op.inputs[2] if op.has(2) else None
    return op.compute(op.out_shape(), element, op.tensor(0), op.inputs[1], zero)


@converts("DynamicQuantizeLinear")
def _dynamic_quantize(op: Op) -> list[Expr]:
    """Range of x with zero included → uint8 scale and zero point (ONNX DynamicQuantizeLinear)."""
    rank = len(op.shape())
    axes = list(range(rank))

    def quantize(x: Any) -> list[Any]:
        low = fold_axes(x, axes, MIN, lambda v: v, "low")
        high = fold_axes(x, axes, MAX, lambda v: v, "high")
        zero, full = const(0, "float32"), const(255, "float32")
        first = [0] * rank

        def scale_of() -> Any:
            span = tirx.max(high(*first), zero) - tirx.min(low(*first), zero)
            return tirx.Select(span == zero, const(1, "float32"), span / full)

        scale = te.compute((), scale_of, name="scale")

        def zero_point_of() -> Any:
            return saturate(round_even((zero - tirx.min(low(*first), zero)) / scale()), "uint8")

        point = te.compute((), zero_point_of, name="zero_point")
        y = te.compute(
            x.shape,
            lambda *i: saturate(round_even(x(*i) / scale()) + cast(point(), "float32"), "uint8"),
            name="quantized",
        )
        return [y, scale, point]

    result = op.te(quantize, op.tensor(0))
    return [op.item(result, i) for i in range(3)]


def _centred(x: Any, zero: Any, along: int | None) -> Any:
    """TE: x − zero point as int32; a vector zero point runs along axis ``along``."""

    def element(*index: Any) -> Any:
        value = cast(x(*index), "int32")
        if zero is None:
            return value
        if not zero.shape or int(np.prod(shape_of(zero))) == 1:
            return value - cast(at(zero, [0] * max(len(zero.shape), 1)), "int32")
        if len(zero.shape) == 1 and along is not None:
            return value - cast(zero(index[along]), "int32")
        return value - cast(at(zero, index), "int32")

    return te.compute(x.shape, element, name="centred")


def _optional(op: Op, i: int) -> Any:
    return op.inputs[i] if op.has(i) else None


@converts("MatMulInteger")
def _matmul_integer(op: Op) -> Expr:
    def product(a: Any, b: Any, a_zero: Any, b_zero: Any) -> Any:
        rank_a, rank_b = len(a.shape), len(b.shape)
        left = _centred(a, a_zero, rank_a - 2 if rank_a > 1 else None)
        return matmul_te(left, _centred(b, b_zero, rank_b - 1), "int32")

    return op.te(product, op.tensor(0), op.tensor(1), _optional(op, 2), _optional(op, 3))


@converts("ConvInteger")
def _conv_integer(op: Op) -> Expr:
    weights = op.shape(1)
    win = window(op, tuple(op.attr("kernel_shape", weights[2:])), op.shape()[2:])

    def conv(x: Any, w: Any, x_zero: Any, w_zero: Any) -> Any:
        return conv_te(
            _centred(x, x_zero, None),
            _centred(w, w_zero, 0),
            win,
            op.attr("group", 1),
            "int32",
        )

    return op.te(conv, op.tensor(0), op.tensor(1), _optional(op, 2), _optional(op, 3))


def _requantized(accumulator: Any, factor: Any, zero: Any, dtype: str) -> Any:
    value = round_even(cast(accumulator, "float32") * factor) + cast(zero, "float32")
    return saturate(value, dtype)


def _first(tensor: Any) -> Any:
    """The element of a one-element tensor."""
    return at(tensor, [0] * max(len(tensor.shape), 1))


def _check_sizes(op: Op, wanted: dict[int, set[int]]) -> None:
    """Scales and zero points of other sizes are no error to shape inference."""
    for number, sizes in wanted.items():
        if op.has(number) and (found := int(np.prod(op.shape(number)))) not in sizes:
            raise UserError(
                f"input {number} of {op.type} has {found} elements, not {max(sizes)}",
                where=op.node.name or None,
                fix="export the model again",
            )


@converts("QLinearMatMul")
def _qlinear_matmul(op: Op) -> Expr:
    dtype = op.out_dtype()
    rows, columns = {1, *op.shape()[-2:-1]}, {1, *op.shape(3)[-1:]}
    _check_sizes(op, {1: rows, 2: rows, 4: columns, 5: columns, 6: {1}, 7: {1}})

    def product(a: Any, sa: Any, za: Any, b: Any, sb: Any, zb: Any, sy: Any, zy: Any) -> Any:
        rank_a, rank_b = len(a.shape), len(b.shape)
        total = matmul_te(_centred(a, za, rank_a - 2), _centred(b, zb, rank_b - 1), "int32")

        def element(*i: Any) -> Any:
            scales = [
                cast(_first(s) if _single(s) else s(i[axis]), "float32")
                for s, axis in ((sa, len(i) - 2), (sb, len(i) - 1))
            ]
            factor = scales[0] * scales[1] / cast(_first(sy), "float32")
            return _requantized(total(*i), factor, _first(zy), dtype)

        return te.compute(total.shape, element, name="requantized")

    return op.te(product, op.tensor(0), *op.inputs[1:3], op.tensor(3), *op.inputs[4:8])


def _single(tensor: Any) -> bool:
    return not tensor.shape or int(np.prod([int(d) for d in tensor.shape])) == 1


@converts("QLinearConv")
def _qlinear_conv(op: Op) -> Expr:
    weights, dtype = op.shape(3), op.out_dtype()
    channels = {1, weights[0]}
    _check_sizes(op, {1: {1}, 2: {1}, 4: channels, 5: channels, 6: {1}, 7: {1}, 8: {weights[0]}})
    win = window(op, tuple(op.attr("kernel_shape", weights[2:])), op.shape()[2:])

    def conv(
        x: Any, sx: Any, zx: Any, w: Any, sw: Any, zw: Any, sy: Any, zy: Any, bias: Any
    ) -> Any:
        total = conv_te(
            _centred(x, zx, None), _centred(w, zw, 0), win, op.attr("group", 1), "int32"
        )

        def element(*i: Any) -> Any:
            weight_scale = _first(sw) if _single(sw) else sw(i[1])
            value = total(*i)
            if bias is not None:
                value = value + at(bias, [i[1]])
            return _requantized(value, _first(sx) * weight_scale / _first(sy), _first(zy), dtype)

        return te.compute(total.shape, element, name="requantized")

    return op.te(
        conv, op.tensor(0), *op.inputs[1:3], op.tensor(3), *op.inputs[4:8], _optional(op, 8)
    )
