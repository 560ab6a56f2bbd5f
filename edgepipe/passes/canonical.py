"""One form for what ONNX can say in several ways.

1. Sum, Max, Min of more than two inputs → a chain of Add, Max, Min; Mean → Add chain and Mul.
   Sum of two → Add.
2. ``auto_pad`` of Conv, ConvTranspose and the pools → explicit ``pads``.
3. Conv, ConvTranspose and pools carry ``kernel_shape``, ``strides``, ``dilations``, ``pads``
   and ``group`` explicitly.
4. CastLike → Cast.
5. Negative ``axis`` attributes → non-negative, missing ones written out.
6. Reduce*: constant ``axes`` sorted and non-negative; missing ones written out (Identity where
   noop_with_empty_axes says so).
7. Flatten, Squeeze, Unsqueeze, Reshape of static shapes → Reshape whose target is a constant
   without 0 and -1.
8. ReduceMean over exactly the spatial axes of an image (rank 4 and more), and AveragePool over
   a whole image without pads → GlobalAveragePool (and Reshape without keepdims). Rank 3 is left
   alone: there it is as likely a sequence [batch, position, feature].
9. ReduceMean of integers → ReduceSum and Div, which cuts fractions off too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError
from edgepipe.passes.editor import Array, Editor, array_of, is_op, shape_of

_SPATIAL = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")
_REDUCE = (
    *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
# Default of ``axis`` by operator; all of them count in the rank of the first input.
_AXIS = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "TopK", "LayerNormalization"), -1),
    **dict.fromkeys(("ArgMax", "ArgMin", "Gather", "GatherElements", "ScatterElements"), 0),
    **dict.fromkeys(("Split", "Concat"), 0),
}


def run(edit: Editor) -> int:
    """Returns the number of nodes changed."""
    count = 0
    for node in edit.nodes():
        rule = _RULES.get(node.op_type)
        if rule is not None and node.domain == "" and rule(edit, node):
            count += 1
    return count


def _variadic(edit: Editor, node: ir.Node) -> bool:
    op = "Add" if node.op_type in ("Sum", "Mean") else node.op_type
    if len(node.inputs) < 2 or (len(node.inputs) == 2 and op == node.op_type):
        return False
    *first, last = node.inputs
    total = first[0]
    for value in first[1:]:
        total = edit.insert(node, op, [total, value])
    if node.op_type == "Mean":
        total = edit.insert(node, op, [total, last])
        dtype = node.outputs[0].dtype
        assert dtype is not None
        share = np.array(1 / len(node.inputs), dtype.numpy())
        edit.become(node, "Mul", [total, edit.constant(share, "share")])
    else:
        edit.become(node, op, [total, last])
    return True


def _spatial(edit: Editor, node: ir.Node) -> bool:
    dims = shape_of(node.inputs[0])
    if dims is None:
        return False
    rank = len(dims) - 2
    attributes = node.attributes
    kernel = attributes.get_ints("kernel_shape", ())
    if not kernel:
        weight = shape_of(node.inputs[1])
        if weight is None:
            return False
        kernel = weight[2:]
    strides = list(attributes.get_ints("strides", ()) or [1] * rank)
    dilations = list(attributes.get_ints("dilations", ()) or [1] * rank)
    pads = list(attributes.get_ints("pads", ()) or [0] * 2 * rank)
    auto = str(attributes.get_string("auto_pad", "NOTSET"))
    out = shape_of(node.outputs[0])
    if node.op_type == "ConvTranspose" and (
        auto.startswith("SAME") or "output_shape" in attributes
    ):
        if out is None:
            return False
        extra = list(attributes.get_ints("output_padding", ()) or [0] * rank)
        pads, more = _transposed_pads(dims[2:], out[2:], kernel, strides, dilations, extra, auto)
        attributes.pop("output_shape", None)
        if any(more):
            attributes.add(ir.AttrInt64s("output_padding", more))
    elif auto.startswith("SAME"):
        pads = _same_pads(dims[2:], kernel, strides, dilations, auto)
    elif auto == "VALID":
        pads = [0] * 2 * rank
    if node.op_type != "ConvTranspose" and not attributes.get_int("ceil_mode", 0):
        _check_windows(node, dims[2:], kernel, dilations, pads)
    attributes.pop("auto_pad", None)
    for name, values in (
        ("kernel_shape", kernel),
        ("strides", strides),
        ("dilations", dilations),
        ("pads", pads),
    ):
        attributes.add(ir.AttrInt64s(name, [int(v) for v in values]))
    if is_op(node, "Conv", "ConvTranspose") and "group" not in attributes:
        attributes.add(ir.AttrInt64("group", 1))
    return auto != "NOTSET"


def _same_pads(
    dims: tuple[int, ...],
    kernel: Sequence[int],
    strides: list[int],
    dilations: list[int],
    auto: str,
) -> list[int]:
    """Pads of auto_pad SAME_*: output is ceil(input / stride); UPPER: odd element last."""
    begin, end = [], []
    for size, k, stride, dilation in zip(dims, kernel, strides, dilations, strict=True):
        needed = (-(-size // stride) - 1) * stride + (int(k) - 1) * dilation + 1 - size
        needed = max(0, needed)
        small, large = needed // 2, needed - needed // 2
        begin.append(small if auto == "SAME_UPPER" else large)
        end.append(large if auto == "SAME_UPPER" else small)
    return begin + end


def _transposed_pads(
    dims: tuple[int, ...],
    out: tuple[int, ...],
    kernel: Sequence[int],
    strides: list[int],
    dilations: list[int],
    extra: list[int],
    auto: str,
) -> tuple[list[int], list[int]]:
    """Pads and output padding that give ConvTranspose the spatial output ``out``."""
    begin, end, more = [], [], []
    for size, o, k, stride, dilation, e in zip(
        dims, out, kernel, strides, dilations, extra, strict=True
    ):
        total = stride * (size - 1) + e + (int(k) - 1) * dilation + 1 - o
        more.append(e + max(0, -total))
        total = max(0, total)
        small, large = total // 2, total - total // 2
        begin.append(small if auto == "SAME_UPPER" else large)
        end.append(large if auto == "SAME_UPPER" else small)
    return begin + end, more


def _check_windows(
    node: ir.Node, size: Sequence[int], kernel: Sequence[int], dilations: Sequence[int],
    pads: Sequence[int],
) -> None:  # fmt: skip
    """Shape inference and ONNX Runtime round -1/s windows to none and add one all the same."""
    for i, (extent, taps, dilation) in enumerate(zip(size, kernel, dilations, strict=True)):
        padded, window = extent + pads[i] + pads[i + len(size)], (taps - 1) * dilation + 1
        if 0 < padded < window:
            raise UserError(
                f"a window of {window} does not fit into {padded} (spatial axis {i}, with pads)",
                where=node.name or node.op_type,
                fix="correct kernel_shape or pads",
            )


def _average(edit: Editor, node: ir.Node) -> bool:
    changed = _spatial(edit, node)
    dims = shape_of(node.inputs[0])
    if dims is None or any(node.attributes.get_ints("pads", ())):
        return changed
    if tuple(node.attributes.get_ints("kernel_shape", ())) != dims[2:]:
        return changed
    if any(d != 1 for d in node.attributes.get_ints("dilations", ())):
        return changed
    edit.become(node, "GlobalAveragePool", [node.inputs[0]])
    return True


def _cast_like(edit: Editor, node: ir.Node) -> bool:
    like = node.inputs[1]
    if like is None or like.dtype is None:
        return False
    edit.become(node, "Cast", [node.inputs[0]], {"to": int(like.dtype)})
    return True


def _cast(edit: Editor, node: ir.Node) -> bool:
    # Saturation only concerns 8-bit floats.
    return node.attributes.pop("saturate", None) is not None


def _axis(edit: Editor, node: ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return False
    axis = node.attributes.get_int("axis", _AXIS[node.op_type])
    positive = axis + len(source.shape) if axis < 0 else axis
    node.attributes.add(ir.AttrInt64("axis", positive))
    return positive != axis


def _reduce(edit: Editor, node: ir.Node) -> bool:
    dims = shape_of(node.inputs[0])
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = array_of(given) if given is not None else np.zeros(0, np.int64)
    if dims is None or axes is None:
        return False
    if axes.size == 0:
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return _reduce_nothing(edit, node)
        axes = np.arange(len(dims))
    axes = np.unique(np.where(axes < 0, axes + len(dims), axes)).astype(np.int64)
    keep = node.attributes.get_int("keepdims", 1)
    spatial = len(dims) >= 4 and axes.tolist() == list(range(2, len(dims)))
    source = node.inputs[0]
    mean, dtype = node.op_type == "ReduceMean", None if source is None else source.dtype
    if mean and dtype is not None and not dtype.is_floating_point():
        return _integer_mean(edit, node, axes, math.prod(dims[a] for a in axes))
    if mean and spatial and dtype is not None:
        if keep:
            edit.become(node, "GlobalAveragePool", [source])
        else:
            pooled = edit.insert(node, "GlobalAveragePool", [source])
            target = edit.constant(np.array(dims[:2], np.int64), "shape")
            edit.become(node, "Reshape", [pooled, target])
        return True
    if given is None or not np.array_equal(array_of(given), axes):  # type: ignore[arg-type]
        edit.set_inputs(node, [source, edit.constant(axes, f"{node.name}/axes")])
    node.attributes.pop("noop_with_empty_axes", None)
    return True


def _integer_mean(edit: Editor, node: ir.Node, axes: Array, count: int) -> bool:
    source = node.inputs[0]
    if not count or source is None or source.dtype is None:
        return False
    keep = {"keepdims": node.attributes.get_int("keepdims", 1)}
    total = edit.insert(node, "ReduceSum", [source, edit.constant(axes, f"{node.name}/axes")], keep)
    divisor = np.asarray(count, source.dtype.numpy())
    edit.become(node, "Div", [total, edit.constant(divisor, f"{node.name}/count")])
    return True


def _reduce_nothing(edit: Editor, node: ir.Node) -> bool:
    """Reduction over no axes: only the elementwise part of the operator is left."""
    source = node.inputs[0]
    match node.op_type:
        case "ReduceL1" | "ReduceL2":
            edit.become(node, "Abs", [source])
        case "ReduceLogSum":
            edit.become(node, "Log", [source])
        case "ReduceSumSquare":
            edit.become(node, "Mul", [source, source])
        case _:
            edit.become(node, "Identity", [source])
    return True


def _reshape(edit: Editor, node: ir.Node) -> bool:
    dims, out = shape_of(node.inputs[0]), shape_of(node.outputs[0])
    if dims is None or out is None:
        return False
    target = array_of(node.inputs[1]) if node.op_type == "Reshape" else None
    if target is not None and target.tolist() == list(out) and 0 not in out:
        return False
    # A zero in the target means "copy" unless allowzero: an empty tensor has to say so.
    attributes = {"allowzero": 1} if 0 in out else {}
    shape = edit.constant(np.array(out, np.int64), f"{node.name}/shape")
    edit.become(node, "Reshape", [node.inputs[0], shape], attributes)
    return True


Rule = Callable[[Editor, ir.Node], bool]
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("Sum", "Mean", "Max", "Min"), _variadic),
    **dict.fromkeys(_SPATIAL, _spatial),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(_AXIS, _axis),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "AveragePool": _average,
    "CastLike": _cast_like,
    "Cast": _cast,
}
