"""Fold BatchNormalization (inference form) into weights.

1. Conv, ConvTranspose or Gemm (constant weight) → BatchNormalization: weight and bias are
   rescaled per output channel. The convolution's result must have no other reader.
2. MatMul with a constant rank-2 weight → BatchNormalization of a rank-2 value: likewise.
3. A BatchNormalization that 1 and 2 do not take becomes Mul and Add per channel.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.errors import Unsupported
from edgepipe.passes.editor import Array, Editor, array_of, is_op, shape_of


def run(edit: Editor) -> int:
    """Returns the number of BatchNormalization nodes replaced."""
    return sum(_replace(edit, node) for node in edit.nodes("BatchNormalization"))


def _replace(edit: Editor, node: ir.Node) -> bool:
    if node.attributes.get_int("training_mode", 0) or any(
        v.uses() or v.is_graph_output() for v in node.outputs[1:]
    ):
        raise Unsupported(
            "BatchNormalization in training mode",
            where=f"node '{node.name}'",
            fix="export the model after model.eval()",
        )
    parameters = [array_of(value) for value in node.inputs[1:5]]
    source = node.inputs[0]
    assert source is not None
    if any(p is None for p in parameters):
        edit.note(node.name, "BatchNormalization not folded: its parameters are not constants")
        _expand(edit, node)
        return True
    scale, bias, mean, variance = (np.asarray(p, np.float64) for p in parameters)
    factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    offset = bias - mean * factor
    if is_op(source.producer(), "MatMul") and len(shape_of(source) or ()) != 2:
        reason: str | None = "MatMul is not a product of two matrices"
    else:
        reason = scale_producer(edit, source, factor, offset)
    if reason is None:
        edit.forward(node.outputs[0], source)
        edit.remove(node)
        return True
    edit.note(node.name, f"BatchNormalization not folded: {reason}")
    rank = len(source.shape) if source.shape is not None else 0
    dtype = source.dtype.numpy() if source.dtype is not None else np.float32
    shape = (-1,) + (1,) * max(0, rank - 2)
    factor_value = edit.constant(factor.reshape(shape).astype(dtype), f"{node.name}/scale")
    offset_value = edit.constant(offset.reshape(shape).astype(dtype), f"{node.name}/offset")
    product = edit.insert(node, "Mul", [source, factor_value])
    edit.become(node, "Add", [product, offset_value])
    return True


def _expand(edit: Editor, node: ir.Node) -> None:
    """BatchNormalization with parameters computed at run time, as elementwise operators."""
    source, scale, bias, mean, variance = node.inputs[:5]
    assert source is not None and source.shape is not None and variance is not None
    shape = edit.constant(np.array([-1] + [1] * (len(source.shape) - 2), np.int64), "shape")
    dtype = variance.dtype.numpy() if variance.dtype is not None else np.float32
    epsilon = edit.constant(np.array(node.attributes.get_float("epsilon", 1e-5), dtype), "epsilon")
    deviation = edit.insert(node, "Sqrt", [edit.insert(node, "Add", [variance, epsilon])])
    factor = edit.insert(node, "Div", [scale, deviation])
    offset = edit.insert(node, "Sub", [bias, edit.insert(node, "Mul", [mean, factor])])
    factor, offset = (edit.insert(node, "Reshape", [v, shape]) for v in (factor, offset))
    if source.dtype is not None and factor.dtype != source.dtype:
        factor, offset = (
            edit.insert(node, "Cast", [v], {"to": int(source.dtype)}) for v in (factor, offset)
        )
    edit.become(node, "Add", [edit.insert(node, "Mul", [source, factor]), offset])


def scale_producer(edit: Editor, value: ir.Value, factor: Array, offset: Array) -> str | None:
    """Make the linear node that computes ``value`` compute ``value * factor + offset`` instead.

    ``factor`` and ``offset`` have one element per output channel (axis 1; of Gemm and MatMul the
    last axis), or one element. Returns None when done, else the reason why not. The arithmetic
    is float64, rounded once.
    """
    node = value.producer()
    if node is None or not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return f"its input comes from {node.op_type if node else 'an input or a constant'}"
    readers = len({user for user, _ in value.uses()}) + value.is_graph_output()
    if readers != 1:
        return f"{node.op_type} output has {readers} consumers"
    weight = array_of(node.inputs[1])
    if weight is None:
        return f"the weight of {node.op_type} is not a constant"
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    bias = array_of(node.inputs[2]) if has_bias else None
    if has_bias and bias is None:
        return f"the bias of {node.op_type} is not a constant"
    axis, group = 0, 1
    if node.op_type == "ConvTranspose":
        axis, group = 1, node.attributes.get_int("group", 1)
    elif node.op_type == "Gemm":
        axis = 0 if node.attributes.get_int("transB", 0) else 1
    elif node.op_type == "MatMul":
        if weight.ndim != 2:
            return "the weight of MatMul is not a matrix"
        if np.any(offset):
            return "MatMul has no bias"
        axis = 1
    channels = weight.shape[axis] * group
    factor = np.broadcast_to(np.asarray(factor, np.float64).reshape(-1), (channels,))
    offset = np.broadcast_to(np.asarray(offset, np.float64).reshape(-1), (channels,))
    dtype = weight.dtype
    node.replace_input_with(
        1,
        edit.constant(_scaled(weight, factor, axis, group).astype(dtype), f"{node.name}/weight"),
    )
    if node.op_type != "MatMul" and (has_bias or np.any(offset)):
        alpha = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
        total = offset if bias is None else bias.astype(np.float64) * alpha * factor + offset
        if node.op_type == "Gemm":
            node.attributes.pop("beta", None)
        node.resize_inputs(3)
        node.replace_input_with(2, edit.constant(total.astype(dtype), f"{node.name}/bias"))
    return None


def _scaled(weight: Array, factor: Array, axis: int, group: int) -> Array:
    """``weight`` times ``factor`` along its output channels (in groups for ConvTranspose)."""
    if group == 1:
        shape = [1] * weight.ndim
        shape[axis] = -1
        return np.asarray(weight * factor.reshape(shape))
    # ConvTranspose weight is [C, M/group, ...]: input channel block g yields output block g.
    blocks = weight.reshape(group, -1, *weight.shape[1:])
    by_group = factor.reshape(group, 1, weight.shape[1], *([1] * (weight.ndim - 2)))
    return np.asarray(blocks * by_group).reshape(weight.shape)
