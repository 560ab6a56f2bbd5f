"""Nodes over codes described as kernel ops: which have one, over which layouts, with what weights.

A tensor is seen as an *image* [n, c, h, w], stored NHWC with a border, or as *rows* of its last
dimension, which is how it is stored anyway. What has no template here runs in the general form.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.kernels.integer_ops import (
    DequantizeOp,
    IntegerOp,
    Limits,
    MoveOp,
    QAddOp,
    QConvOp,
    QMulOp,
    QPoolOp,
    QTableOp,
    QuantizeOp,
    Residual,
)
from edgepipe.kernels.layout import NO_PADS, Blocked, Pads
from edgepipe.kernels.template import select
from edgepipe.lowering.anchors import ints
from edgepipe.lowering.integers.terms import AXES, DOMAIN, ZERO, Integer, integer_of
from edgepipe.quantization.graph import Array, constant, dims, is_op
from edgepipe.target import Target

CODES = (ir.DataType.INT8, ir.DataType.UINT8)
#: Largest magnitudes that kernels tell apart.
LIMITS = (8, 63, 127)
IMAGE, ROWS = "image", "rows"


def zero_of(value: ir.Value) -> int:
    """The zero point of a tensor of codes."""
    return int(value.meta.get(ZERO, 0))


def is_codes(value: ir.Value | None) -> bool:
    """Whether ``value`` holds codes of the integer lowering."""
    return value is not None and value.dtype in CODES and ZERO in value.meta


def handles(node: ir.Node) -> bool:
    """Whether ``node`` belongs here: it computes on codes, or makes or ends them."""
    if node.domain == DOMAIN or is_op(node, "QuantizeLinear"):
        return node.domain == DOMAIN or is_codes(node.outputs[0])
    return is_codes(node.inputs[0]) and is_op(
        node, "DequantizeLinear", "MaxPool", "Concat", "Resize"
    )


def shape(value: ir.Value | None) -> tuple[int, ...]:
    """Static shape; every value has one."""
    assert value is not None
    found = dims(value)
    assert found is not None, value.name
    return found


def view_of(node: ir.Node) -> str:
    """How a node sees its tensors."""
    if is_op(node, "MaxPool", "Resize", "Concat") or node.op_type in (
        "Conv",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMean",
    ):
        return IMAGE
    if node.op_type in ("MatMul", "Gemm"):
        return ROWS
    rank = len(shape(node.inputs[0]))
    if rank == 3:  # a sequence of channels where a convolution reads it
        readers = [use.node for use in node.outputs[0].uses()]
        return IMAGE if any(r.op_type == "Conv" for r in readers) else ROWS
    return IMAGE if rank == 4 else ROWS


def four(value: ir.Value, view: str) -> tuple[int, int, int, int] | None:
    """[n, c, h, w] of a tensor under a view; None where it has none."""
    full = shape(value)
    if view == ROWS:
        return (1, full[-1], 1, int(np.prod(full[:-1]))) if full else None
    if len(full) == 3:
        return full[0], full[1], 1, full[2]
    return full if len(full) == 4 else None


def layout(value: ir.Value, view: str, lanes: int, pads: Pads = NO_PADS) -> Blocked:
    """How a group stores ``value``; ``lanes`` of float32."""
    found = four(value, view)
    assert found is not None
    n, c, h, w = found
    if view == ROWS:
        lanes = c
    elif is_codes(value):
        # One or two channels are packed as they are: four bytes are then several taps of a row.
        lanes = c if c <= 2 else 4 if c <= 4 else -(-c // 8) * 8
    dtype = "float32"
    if is_codes(value):
        assert value.dtype is not None
        dtype = str(value.dtype.numpy())
    return Blocked(n, c, h, w, lanes, pads, dtype, zero_of(value) if is_codes(value) else 0)


def plain(value: ir.Value, view: str) -> Blocked:
    """How ``value`` is stored in ONNX's own order."""
    if view == ROWS:
        return layout(value, view, 1)
    own = layout(value, view, 1)
    return Blocked(own.n, own.c, own.h, own.w, 1, NO_PADS, own.dtype, own.zero)


def refuse(node: ir.Node, target: Target) -> str | None:
    """None when a template can do ``node``, else the reason."""
    view = view_of(node)
    if any(four(v, view) is None for v in [*data(node), *node.outputs]):
        return "it is no image and has no rows"
    reason = _unfit(node)
    if reason is not None:
        return reason
    lanes = target.simd.lanes_f32
    inputs = [layout(v, view, lanes) if is_codes(v) else plain(v, view) for v in data(node)]
    op = describe(node, inputs, layout(node.outputs[0], view, lanes))
    if isinstance(op, str):
        return op
    template, reasons = select(op, target)
    return None if template is not None else "; ".join(reasons) or "there is no template"


def data(node: ir.Node) -> list[ir.Value]:
    """The tensors a node computes on."""
    values = node.inputs if node.domain == DOMAIN or is_op(node, "Concat") else node.inputs[:1]
    return [v for v in values if v is not None]


def _unfit(node: ir.Node) -> str | None:
    """Attributes that templates do not take."""
    if str(node.attributes.get_string("auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
        return "auto_pad is not resolved"
    if any(p < 0 for p in ints(node, "pads", ())) or 0 in shape(node.outputs[0]):
        return "negative padding or an empty result"
    if (
        is_op(node, "Concat")
        and node.attributes.get_int("axis", 1) % len(shape(node.outputs[0])) != 1
    ):
        return "it does not concatenate channels"
    if is_op(node, "Resize"):
        return _not_repeating(node)
    if is_op(node, "MaxPool", "AveragePool") or node.op_type == "AveragePool":
        return _pool_unfit(node)
    if node.op_type == "ReduceMean":
        rank = len(shape(node.inputs[0]))
        axes = {a % rank for a in node.meta[AXES]}
        spatial = axes == set(range(2, rank)) and rank == 4
        return (
            None if spatial and node.attributes.get_int("keepdims", 1) != 0 else "not over pixels"
        )
    return None


def _not_repeating(node: ir.Node) -> str | None:
    """Why a Resize of codes is not a repetition of pixels; for whole factors these pairs of
    coordinates and rounding both read pixel floor(i / factor)."""
    before, after = shape(node.inputs[0]), shape(node.outputs[0])
    if len(before) != 4 or before[:2] != after[:2]:
        return "not along height and width"
    if after[2] % before[2] or after[3] % before[3]:
        return "not a whole factor"
    transform = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    if (transform, rounding) == ("asymmetric", "floor"):
        return None
    half = transform in ("half_pixel", "pytorch_half_pixel") and str(rounding).startswith("round_")
    return None if half else f"{transform} with {rounding}"


def _pool_unfit(node: ir.Node) -> str | None:
    if any(d != 1 for d in ints(node, "dilations", (1,))):
        return "dilated"
    kernel = ints(node, "kernel_shape", ())
    pads = ints(node, "pads", (0,) * 2 * len(kernel))
    if any(p >= k for p, k in zip(pads, kernel * 2, strict=True)):
        return "a window lies in the padding alone"
    if node.op_type == "AveragePool" and integer_of(node).multipliers[0].size > 1:
        return "its windows count differently"
    return None


def _pair(node: ir.Node, name: str, default: int) -> tuple[int, int]:
    rank = len(shape(node.inputs[0])) - 2
    values = ints(node, name, (default,) * rank)
    return (values[0], values[1]) if rank == 2 else (default, values[0])


def _begin(node: ir.Node) -> tuple[int, int]:
    rank = len(shape(node.inputs[0])) - 2
    pads = ints(node, "pads", (0,) * 2 * rank)
    return (pads[0], pads[1]) if rank == 2 else (0, pads[0])


def _kernel(node: ir.Node) -> tuple[int, int]:
    if node.domain == DOMAIN and node.op_type == "Conv":
        weights = integer_of(node).term.weights
        assert weights is not None
        *_, kh, kw = (1, *weights.codes.shape[2:])
        return kh, kw
    return _pair(node, "kernel_shape", 1)


def border(node: ir.Node) -> Pads:
    """The border that a convolution or average reads around its input."""
    if node.domain != DOMAIN or node.op_type not in ("Conv", "AveragePool"):
        return NO_PADS
    (kh, kw), (sy, sx), (dy, dx) = (
        _kernel(node),
        _pair(node, "strides", 1),
        _pair(node, "dilations", 1),
    )
    top, left = _begin(node)
    source, result = four(data(node)[0], IMAGE), four(node.outputs[0], IMAGE)
    assert source is not None and result is not None
    below = (result[2] - 1) * sy + (kh - 1) * dy + 1 - top - source[2]
    right = (result[3] - 1) * sx + (kw - 1) * dx + 1 - left - source[3]
    return top, left, max(below, 0), max(right, 0)


def describe(node: ir.Node, inputs: list[Blocked], y: Blocked) -> IntegerOp | str:
    """The op of ``node`` over these layouts, or why there is none."""
    if node.domain == DOMAIN:
        return _arithmetic(node, inputs, y)
    x = inputs[0]
    if is_op(node, "QuantizeLinear"):
        return QuantizeOp(x, y, float(_scalar(node.inputs[1])))
    if is_op(node, "DequantizeLinear"):
        return DequantizeOp(x, y, float(_scalar(node.inputs[1])))
    if is_op(node, "MaxPool"):
        kernel, strides = _pair(node, "kernel_shape", 1), _pair(node, "strides", 1)
        return QPoolOp("max", x, y, kernel, strides, _begin(node))
    factors = (y.h // x.h, y.w // x.w) if is_op(node, "Resize") else (1, 1)
    return MoveOp(tuple(inputs), y, factors)


def _scalar(value: ir.Value | None) -> Any:
    array = constant(value)
    assert array is not None
    return array.reshape(())


def _arithmetic(node: ir.Node, inputs: list[Blocked], y: Blocked) -> IntegerOp | str:
    integer = integer_of(node)
    kind = integer.term.kind
    if kind == "table":
        same = (inputs[0].n, inputs[0].c, inputs[0].h, inputs[0].w) == (y.n, y.c, y.h, y.w)
        return QTableOp(inputs[0], y) if same else "its shape changes"
    limits = limits_of(integer)
    first, *others = integer.multipliers
    own = len(integer.term.inputs)
    if any(m.size > 1 for m in others):
        return "its residuals have a multiplier per channel"
    residuals = tuple(
        Residual(x, float(m.reshape(()))) for x, m in zip(inputs[own:], others, strict=True)
    )
    if any(
        (r.layout.n, r.layout.c, r.layout.h, r.layout.w) != (y.n, y.c, y.h, y.w) for r in residuals
    ):
        return "its addends broadcast"
    if kind == "product":
        return _product(node, integer, inputs[0], y, residuals)
    if first.size > 1:
        return "its multipliers differ"
    multiplier = float(first.reshape(()))
    if kind == "codes":
        addends = (Residual(inputs[0], multiplier), *residuals)
        same = (inputs[0].n, inputs[0].c, inputs[0].h, inputs[0].w) == (y.n, y.c, y.h, y.w)
        return QAddOp(addends, y, limits) if same else "its addends broadcast"
    if residuals:
        return f"a {kind} with addends"
    if kind == "multiply":
        return _multiply(inputs, y, multiplier, limits)
    x = inputs[0]
    if node.op_type == "AveragePool":
        kernel, strides, offset = _kernel(node), _pair(node, "strides", 1), _begin(node)
        return QPoolOp("average", x, y, kernel, strides, offset, multiplier, limits)
    return QPoolOp("average", x, y, (x.h, x.w), (1, 1), (0, 0), multiplier, limits)


#: Float sums inside this are rounded by adding 1.5 · 2^23; a margin is left for rounding errors.
_ROUNDABLE = 2.0**21


def limits_of(integer: Integer) -> Limits:
    """Bounds of the node's sum, and whether its accumulators can leave the roundable range."""
    term = integer.term
    largest = 255.0
    if term.weights is not None:
        codes, axis = np.abs(term.weights.codes.astype(np.float64)), term.weights.axis
        rows = np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1).sum(1)
        bias = 0.0 if term.bias is None else np.abs(term.bias.astype(np.float64)).max()
        largest = 255.0 * rows.max() + bias
    elif term.kind == "multiply":
        largest = 255.0**2
    elif term.kind != "codes":
        largest = np.inf
    first, *others = (float(np.abs(m).max(initial=0)) for m in integer.multipliers)
    reach = largest * first + 255.0 * sum(others)
    return Limits(integer.low, integer.high, bool(reach < _ROUNDABLE))


def _multiply(
    inputs: list[Blocked], y: Blocked, multiplier: float, limits: Limits
) -> IntegerOp | str:
    a, b = sorted(inputs, key=lambda x: -x.h * x.w * x.n)
    fits = (a.n, a.c, a.h, a.w) == (y.n, y.c, y.h, y.w) and b.c == y.c
    if not fits or (b.n, b.h, b.w) not in ((y.n, y.h, y.w), (y.n, 1, 1), (1, 1, 1)):
        return "its factors broadcast"
    if (a, b) != (inputs[0], inputs[1]):
        return "its first factor broadcasts"
    return QMulOp(a, b, y, multiplier, limits)


def _product(
    node: ir.Node, integer: Integer, x: Blocked, y: Blocked, residuals: tuple[Residual, ...]
) -> IntegerOp | str:
    if integer.term.weights is None:
        return "both operands are computed"
    codes = integer.term.weights.codes
    peak = int(np.abs(codes).max(initial=0))
    if codes.max(initial=0) == 8:  # one more than four bits hold
        peak = 9
    limit = next((bound for bound in LIMITS if peak <= bound), None)
    if limit is None:
        return "its weights do not fit int8"
    if node.op_type == "ConvTranspose":
        return "it is transposed"
    bits = 4 if limit == LIMITS[0] else 8
    limits = limits_of(integer)
    shared = {"limits": limits, "limit": limit, "bits": bits, "residuals": residuals}
    if node.op_type in ("MatMul", "Gemm"):
        return QConvOp(x, y, (1, 1), **shared)  # type: ignore[arg-type]
    if codes.ndim not in (3, 4):
        return f"{codes.ndim - 2}-D"
    return QConvOp(
        x,
        y,
        _kernel(node),
        strides=_pair(node, "strides", 1),
        dilations=_pair(node, "dilations", 1),
        offset=_begin(node),
        groups=node.attributes.get_int("group", 1),
        **shared,  # type: ignore[arg-type]
    )


def weights_of(node: ir.Node) -> list[Array]:
    """What the template packs: int8 weights, int32 bias, float32 multipliers; or a table."""
    if node.domain != DOMAIN:
        return []
    integer = integer_of(node)
    term = integer.term
    if term.table is not None:
        return [term.table]
    if term.weights is None:
        return []
    codes = term.weights.codes.astype(np.int8)
    if node.op_type in ("MatMul", "Gemm"):
        if node.op_type == "MatMul" or not node.attributes.get_int("transB", 0):
            codes = codes.T
        codes = codes[:, :, None, None]
    elif codes.ndim == 3:
        codes = codes[:, :, None]
    bias = np.zeros(len(codes), np.int32) if term.bias is None else term.bias.reshape(-1)
    multiplier = np.asarray(integer.multipliers[0], np.float32).reshape(-1)
    return [np.ascontiguousarray(codes), bias, multiplier]
