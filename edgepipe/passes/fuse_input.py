"""Fold multiplications and additions of per-channel constants into the linear operator after.

Typical for models that normalise their input themselves.

1. Mul or Div by a constant → Conv, Gemm, MatMul (constant weight): into the weight's input
   channels.
2. Add or Sub of a constant → Conv without pads, Gemm: into the bias. With pads the border would
   differ: the zeros of the padding are not shifted.

The constant has one element, or one per input channel; the linear operator must be the only
reader of the sum or product.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Array, Editor, array_of, is_op, only_user, shape_of


def run(edit: Editor) -> int:
    """Returns the number of nodes folded."""
    # From the end, so that (x - mean) / deviation folds its division first.
    nodes = list(edit.nodes("Mul", "Div", "Add", "Sub"))
    return sum(_fold(edit, node) for node in reversed(nodes))


def _fold(edit: Editor, node: ir.Node) -> bool:
    source, constant = node.inputs[0], array_of(node.inputs[1])
    if constant is None and node.op_type in ("Mul", "Add"):
        source, constant = node.inputs[1], array_of(node.inputs[0])
    user = only_user(node.outputs[0])
    if constant is None or source is None or not is_op(user, "Conv", "Gemm", "MatMul"):
        return False
    assert user is not None
    weight, dims = array_of(user.inputs[1]), shape_of(source)
    if weight is None or user.inputs[0] is not node.outputs[0] or dims is None:
        return False
    if dims != shape_of(node.outputs[0]) or user.attributes.get_int("transA", 0) != 0:
        return False
    axis = 1 if user.op_type == "Conv" else len(dims) - 1
    aligned = (1,) * (len(dims) - constant.ndim) + constant.shape
    wanted = tuple(d if i == axis else 1 for i, d in enumerate(dims))
    if constant.size != 1 and aligned != wanted:
        edit.note(node.name, f"{node.op_type} not folded: its constant is not one per channel")
        return False
    values = np.broadcast_to(constant.reshape(-1).astype(np.float64), (dims[axis],))
    if node.op_type in ("Add", "Sub"):
        reason = _shift(edit, user, weight, -values if node.op_type == "Sub" else values)
        if reason is not None:
            edit.note(node.name, f"{node.op_type} not folded: {reason}")
            return False
    else:
        factor = values if node.op_type == "Mul" else 1 / values
        scaled = (weight * _by_input(user, weight, factor)).astype(weight.dtype)
        user.replace_input_with(1, edit.constant(scaled, f"{user.name}/weight"))
    user.replace_input_with(0, source)
    edit.remove(node)
    return True


def _by_input(user: ir.Node, weight: Array, values: Array) -> Array:
    """``values`` (one per input channel) in a shape that broadcasts against the weight."""
    if user.op_type == "Conv":
        group = user.attributes.get_int("group", 1)
        outputs, inputs = weight.shape[:2]
        rows = np.repeat(values.reshape(group, inputs), outputs // group, axis=0)
        return rows.reshape(outputs, inputs, *[1] * (weight.ndim - 2))
    if user.op_type == "Gemm" and user.attributes.get_int("transB", 0) != 0:
        return values.reshape(1, -1)
    return values.reshape(-1, 1)


def _shift(edit: Editor, user: ir.Node, weight: Array, offset: Array) -> str | None:
    """Add what ``offset`` on every input contributes to the bias; or the reason why not."""
    pads = [*user.attributes.get_ints("pads", ())]
    auto = user.attributes.get_string("auto_pad", "NOTSET")
    if any(pads) or auto not in ("NOTSET", "VALID"):
        return "the convolution pads with zeros that are not shifted"
    if user.op_type == "MatMul":
        return "MatMul has no bias"
    has_bias = len(user.inputs) > 2 and user.inputs[2] is not None
    bias = array_of(user.inputs[2]) if has_bias else np.zeros(1)
    if bias is None:
        return f"the bias of {user.op_type} is not a constant"
    product = weight.astype(np.float64) * _by_input(user, weight, offset)
    if user.op_type == "Conv":
        added = product.reshape(weight.shape[0], -1).sum(axis=1)
    else:
        transposed = user.attributes.get_int("transB", 0) != 0
        added = product.sum(axis=1 if transposed else 0) * user.attributes.get_float("alpha", 1.0)
        bias = bias * user.attributes.get_float("beta", 1.0)
        if bias.ndim == 2 and bias.shape[0] != 1:
            return "the bias has one value per row"
        bias = bias.reshape(-1)
        user.attributes.pop("beta", None)
    user.resize_inputs(3)
    total = (bias.astype(np.float64) + added).astype(weight.dtype)
    user.replace_input_with(2, edit.constant(total, f"{user.name}/bias"))
    return None
