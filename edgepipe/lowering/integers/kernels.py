"""Nodes over codes described as kernel ops: which have one, over which layouts, with what weights.

What has no template here runs in the general form.
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
    QMatmulOp,
    QMulOp,
    QPoolOp,
    QResizeOp,
    QTableOp,
    QuantizeOp,
    Residual,
)
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.qdepthwise import short_sums
from edgepipe.kernels.template import select
from edgepipe.lowering.anchors import ints
from edgepipe.lowering.integers.geometry import (
    begin,
    data,
    four,
    is_codes,
    layout,
    pair,
    plain,
    shape,
    view_of,
    window,
)
from edgepipe.lowering.integers.terms import AXES, DOMAIN, Integer, integer_of
from edgepipe.quantization import linear_resize
from edgepipe.quantization.graph import Array, constant, is_op
from edgepipe.target import Target

#: Largest magnitudes that kernels tell apart.
LIMITS = (8, 63, 127)


def handles(node: ir.Node) -> bool:
    """Whether ``node`` belongs here: it computes on codes, or makes or ends them."""
    if node.domain == DOMAIN or is_op(node, "QuantizeLinear"):
        return node.domain == DOMAIN or is_codes(node.outputs[0])
    return is_codes(node.inputs[0]) and is_op(
        node, "DequantizeLinear", "MaxPool", "Concat", "Resize", "DepthToSpace"
    )


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
        kernel, strides = pair(node, "kernel_shape", 1), pair(node, "strides", 1)
        return QPoolOp("max", x, y, kernel, strides, begin(node))
    if is_op(node, "DepthToSpace"):
        interleave = node.attributes.get_string("mode", "DCR") == "CRD"
        return MoveOp(tuple(inputs), y, spread=y.h // x.h, interleave=interleave)
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
    if kind == "product" and integer.term.weights is not None:
        return _product(node, integer, inputs[0], y, residuals)
    if first.size > 1:
        return "its multipliers differ"
    multiplier = float(first.reshape(()))
    if kind == "product":
        return "addends" if residuals else _of_two(node, inputs, y, multiplier, limits)
    if kind == "codes":
        addends = (Residual(inputs[0], multiplier), *residuals)
        same = (inputs[0].n, inputs[0].c, inputs[0].h, inputs[0].w) == (y.n, y.c, y.h, y.w)
        return QAddOp(addends, y, limits) if same else "its addends broadcast"
    if residuals:
        return f"a {kind} with addends"
    if kind == "multiply":
        return _multiply(inputs, y, multiplier, limits)
    x = inputs[0]
    if kind == "resize":
        return QResizeOp(x, y, multiplier, limits)
    if node.op_type == "AveragePool":
        kernel, strides, offset = window(node), pair(node, "strides", 1), begin(node)
        return QPoolOp("average", x, y, kernel, strides, offset, multiplier, limits)
    return QPoolOp("average", x, y, (x.h, x.w), (1, 1), (0, 0), multiplier, limits)


#: Float sums inside this are rounded by adding 1.5 · 2^23, and inside this they are an int16; a
#: margin is left for rounding errors.
_ROUNDABLE, _SHORT = 2.0**21, 32000.0


def limits_of(integer: Integer) -> Limits:
    """Bounds of the node's sum, and how far its accumulators can take it."""
    term = integer.term
    largest = np.full(1, 255.0)
    if term.weights is not None:
        bias = np.zeros(1) if term.bias is None else term.bias
        sums = term.weight_sums()
        largest = 255.0 * sums + _of_channels(bias, sums.size)
    elif term.kind == "multiply":
        largest = np.full(1, 255.0**2)
    elif term.kind not in ("codes", "resize"):
        largest = np.full(1, 1e300)  # unknown, and finite for multipliers of zero
    first, *others = integer.multipliers
    reach = float((largest * _of_channels(first, largest.size)).max())
    reach += 255.0 * sum(float(_of_channels(m, 1)[0]) for m in others)
    return Limits(integer.low, integer.high, reach < _ROUNDABLE, reach < _SHORT)


def _of_channels(values: Array, count: int) -> Array:
    """Magnitudes (float64) of ``count`` channels; the largest for all where they are not as many,
    since a transposed convolution's groups share their weights' channels."""
    magnitudes: Array = np.abs(values.astype(np.float64)).reshape(-1)
    return magnitudes if magnitudes.size == count else magnitudes.max(initial=0, keepdims=True)


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


def _of_two(
    node: ir.Node, inputs: list[Blocked], y: Blocked, multiplier: float, limits: Limits
) -> IntegerOp | str:
    """The product of two tensors of codes."""
    a, b = (shape(value) for value in node.inputs)
    if len(a) < 2 or len(b) < 2:
        return "a vector"
    batch, shared = int(np.prod(a[:-2])), int(np.prod(b[:-2])) == 1
    if not shared and a[:-2] != b[:-2]:
        return "its batch dimensions broadcast"
    return QMatmulOp(
        inputs[0], inputs[1], y, batch, 1 if shared else batch,
        a[-2], a[-1], b[-1], multiplier, limits,
    )  # fmt: skip


def _product(
    node: ir.Node, integer: Integer, x: Blocked, y: Blocked, residuals: tuple[Residual, ...]
) -> IntegerOp | str:
    assert integer.term.weights is not None
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
    groups = node.attributes.get_int("group", 1)
    if groups == len(codes) and codes.shape[1] == 1:
        shared["short_sums"] = short_sums(codes.reshape(groups, -1), x.dtype == "int8")
    return QConvOp(
        x,
        y,
        window(node),
        strides=pair(node, "strides", 1),
        dilations=pair(node, "dilations", 1),
        offset=begin(node),
        groups=groups,
        **shared,  # type: ignore[arg-type]
    )


def weights_of(node: ir.Node) -> list[Array]:
    """What the template packs: int8 weights, int32 bias, float32 multipliers; or tables."""
    if node.domain != DOMAIN:
        return []
    integer = integer_of(node)
    term = integer.term
    if term.table is not None:
        return [term.table]
    if term.kind == "resize":
        return linear_resize.tables(node)
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
