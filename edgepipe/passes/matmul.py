"""Canonical forms of matrix products.

1. Gemm of rank 2 has transA=0, alpha=beta=1, a constant weight with transB=1 (stored [N, K], as
   dense kernels read it) and a bias of shape [N] when the bias is a constant that allows it.
2. MatMul of a rank-2 value with a constant matrix → Gemm of that form.
3. Gemm without bias → Add of a constant row vector becomes its bias.
4. MatMul of two values multiplied by a scalar each (attention: both by the fourth root of the
   size): one scalar, on the left.
5. MatMul of higher rank stays MatMul, with an Add after it for the bias.
6. Constants are the second operand of Add, Mul, Max and Min.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Editor, array_of, is_op, only_user, scalar_of, shape_of


def run(edit: Editor) -> int:
    """Returns the number of nodes changed."""
    count = 0
    for node in edit.nodes("Add", "Mul", "Max", "Min"):
        count += _constant_second(edit, node)
    for node in edit.nodes("MatMul"):
        count += _from_matmul(edit, node) or _one_scalar(edit, node)
    for node in edit.nodes("Gemm"):
        count += _canonical(edit, node) + _absorb_bias(edit, node)
    return count


def _from_matmul(edit: Editor, node: ir.Node) -> bool:
    source, weight = node.inputs
    dims = shape_of(source)
    if dims is None or len(dims) != 2 or array_of(weight) is None:
        return False
    if (shape_of(weight) or ()).__len__() != 2 or not _is_float(source):
        return False
    edit.become(node, "Gemm", [source, weight])
    return True


def _one_scalar(edit: Editor, node: ir.Node) -> bool:
    left, right = (_scaled(value, node) for value in node.inputs)
    if left is None or right is None:
        return False
    product = (scalar_of(left.inputs[1]) or 0.0) * (scalar_of(right.inputs[1]) or 0.0)
    old = array_of(left.inputs[1])
    assert old is not None
    scalar = np.full(old.shape, product).astype(old.dtype)
    left.replace_input_with(1, edit.constant(scalar, f"{node.name}/scale"))
    node.replace_input_with(1, right.inputs[0])
    edit.remove(right)
    return True


def _scaled(value: ir.Value | None, reader: ir.Node) -> ir.Node | None:
    """The node that multiplies ``value`` by a scalar constant for ``reader`` alone."""
    node = value.producer() if value is not None else None
    if value is None or node is None or not is_op(node, "Mul"):
        return None
    plain = shape_of(node.inputs[0]) == shape_of(value) and only_user(value) is reader
    return node if plain and scalar_of(node.inputs[1]) is not None else None


def _canonical(edit: Editor, node: ir.Node) -> bool:
    attributes = node.attributes
    changed = False
    if attributes.get_int("transA", 0) != 0:
        turned = edit.insert(node, "Transpose", [node.inputs[0]], {"perm": [1, 0]})
        node.replace_input_with(0, turned)
        changed = True
    attributes.pop("transA", None)
    weight = array_of(node.inputs[1])
    if weight is None:
        return changed
    alpha, transposed = attributes.get_float("alpha", 1.0), attributes.get_int("transB", 0) != 0
    if alpha != 1 or not transposed:
        matrix = weight if transposed else weight.T
        if alpha != 1:
            matrix = (matrix.astype(np.float64) * alpha).astype(weight.dtype)
        node.replace_input_with(1, edit.constant(matrix, f"{node.inputs[1].name}/nk"))  # type: ignore[union-attr]
        changed = True
    attributes.pop("alpha", None)
    attributes.add(ir.AttrInt64("transB", 1))
    beta = attributes.get_float("beta", 1.0)
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None:
        return changed
    features = shape_of(node.inputs[1])
    assert features is not None
    if bias.shape != (features[0],) or beta != 1:
        if bias.ndim == 2 and bias.shape[0] != 1:
            edit.note(node.name, "Gemm keeps a bias with one value per row")
            return changed
        row = np.broadcast_to(bias.reshape(-1), (features[0],))
        row = (row.astype(np.float64) * beta).astype(weight.dtype)
        attributes.pop("beta", None)
        node.replace_input_with(2, edit.constant(row, f"{node.name}/bias"))
        changed = True
    attributes.pop("beta", None)
    return changed


def _absorb_bias(edit: Editor, node: ir.Node) -> bool:
    user = only_user(node.outputs[0])
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    if has_bias or user is None or not is_op(user, "Add"):
        return False
    other = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
    bias, dims = array_of(other), shape_of(node.outputs[0])
    if bias is None or dims is None:
        return False
    if bias.size not in (1, dims[1]) or bias.shape[:-1] not in ((), (1,)):
        edit.note(user.name, "Add not folded into Gemm: not one value per output feature")
        return False
    if shape_of(user.outputs[0]) != dims:
        return False
    row = np.broadcast_to(bias.reshape(-1), (dims[1],))
    node.resize_inputs(3)
    node.replace_input_with(2, edit.constant(row, f"{node.name}/bias"))
    edit.forward(user.outputs[0], node.outputs[0])
    edit.remove(user)
    return True


def _constant_second(edit: Editor, node: ir.Node) -> bool:
    if len(node.inputs) != 2 or array_of(node.inputs[0]) is None:
        return False
    edit.set_inputs(node, [node.inputs[1], node.inputs[0]])
    return True


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_floating_point()
