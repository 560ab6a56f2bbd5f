"""One form for the Q/DQ pairs that exporters write in several.

1. QuantizeLinear and DequantizeLinear without a zero point get one of zeros.
2. Transpose, Reshape, Flatten, Squeeze, Unsqueeze and Identity of dequantised constants move in
   front of the DequantizeLinear, onto the codes: weights are read where they are dequantised.
3. A float bias behind dequantised inputs and weights becomes int32 codes on the product's scale
   (input scale × weight scale), rounded to the nearest: accumulators take it. Left as it is where
   the codes would not fit.

No pass of this folder looks through a Q/DQ pair otherwise: rounding is part of the model.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Array, Editor, array_of, is_op, shape_of

_MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
#: Largest bias code: the rest of the int32 is for the products.
BIAS_LIMIT = 2**30


def run(edit: Editor) -> int:
    """Returns the number of nodes changed."""
    count = sum(_explicit_zero(edit, n) for n in edit.nodes("QuantizeLinear", "DequantizeLinear"))
    count += sum(_move_onto_codes(edit, node) for node in edit.nodes(*_MOVES))
    return count + sum(_integer_bias(edit, n) for n in edit.nodes("Conv", "ConvTranspose", "Gemm"))


def _explicit_zero(edit: Editor, node: ir.Node) -> bool:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return False
    codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    shape = shape_of(node.inputs[1])
    assert codes is not None
    if shape is None or codes.dtype is None or not codes.dtype.is_integer():
        return False
    zero = edit.constant(np.zeros(shape, codes.dtype.numpy()), f"{node.name}/zero_point")
    edit.set_inputs(node, [*node.inputs[:2], zero])
    return True


def _move_onto_codes(edit: Editor, node: ir.Node) -> bool:
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    shape = shape_of(node.outputs[0])
    if source is None or not is_op(source, "DequantizeLinear") or shape is None:
        return False
    arrays = [array_of(value) for value in source.inputs]
    codes, scale = arrays[0], arrays[1]
    if codes is None or scale is None or node.outputs[0].is_graph_output():
        return False
    permutation: tuple[int, ...] | None = None
    if is_op(node, "Transpose"):
        permutation = tuple(node.attributes.get_ints("perm", range(codes.ndim)[::-1]))
    attributes = {}
    if scale.size > 1:
        axis = source.attributes.get_int("axis", 1) % codes.ndim
        moved = permutation.index(axis) if permutation else _same_axis(codes.shape, shape, axis)
        if moved is None or (scale.ndim > 1 and permutation is None):
            edit.note(node.name, f"{node.op_type} of dequantised weights mixes their scales")
            return False
        attributes = {"axis": moved}
        if block := source.attributes.get_int("block_size", 0):
            attributes["block_size"] = block

    def move(array: Array | None, *, like_codes: bool) -> Array | None:
        if array is None or not like_codes:
            return array
        return array.transpose(permutation) if permutation else array.reshape(shape)

    blocked = scale.ndim > 1
    moved_arrays = [move(codes, like_codes=True)]
    moved_arrays += [move(array, like_codes=blocked) for array in arrays[1:]]
    values = [
        None if array is None else edit.constant(array, f"{node.name}/{index}")
        for index, array in enumerate(moved_arrays)
    ]
    edit.forward(node.outputs[0], edit.insert(node, "DequantizeLinear", values, attributes))
    edit.remove(node)
    return True


def _same_axis(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Where ``axis`` is after a reshape that leaves it whole; None where it does not."""
    outside = math.prod(before[:axis])
    for index, size in enumerate(after):
        if size == before[axis] and math.prod(after[:index]) == outside:
            return index
    return None


def _integer_bias(edit: Editor, node: ir.Node) -> bool:
    bias = array_of(node.inputs[2]) if len(node.inputs) > 2 else None
    data, weight = (v.producer() if v is not None else None for v in node.inputs[:2])
    if bias is None or not is_op(data, "DequantizeLinear") or not is_op(weight, "DequantizeLinear"):
        return False
    assert data is not None and weight is not None
    step, scale = array_of(data.inputs[1]), array_of(weight.inputs[1])
    codes = array_of(weight.inputs[0])
    if step is None or step.size != 1 or scale is None or codes is None:
        return False
    channels = shape_of(node.outputs[0])
    groups = node.attributes.get_int("group", 1) if is_op(node, "ConvTranspose") else 1
    if channels is None or scale.size not in (1, channels[1] // groups) or bias.ndim != 1:
        return False
    if is_op(node, "Gemm") and node.attributes.get_float("beta", 1.0) != 1.0:
        return False
    product = np.float32(step.reshape(())) * np.tile(scale.reshape(-1).astype(np.float32), groups)
    product = np.broadcast_to(product, bias.shape) if product.size == 1 else product
    exact = bias.astype(np.float64) / product.astype(np.float64)
    if product.shape != bias.shape or not np.all(np.abs(exact) <= BIAS_LIMIT):
        edit.note(node.name, "its float bias does not fit int32 on the product's scale")
        return False
    stem = f"{node.name}/bias"
    values = [
        edit.constant(np.rint(exact).astype(np.int32), f"{stem}_codes"),
        edit.constant(np.ascontiguousarray(product), f"{stem}_scale"),
        edit.constant(np.zeros(bias.shape, np.int32), f"{stem}_zero_point"),
    ]
    restored = edit.insert(node, "DequantizeLinear", values, {"axis": 0})
    edit.set_inputs(node, [*node.inputs[:2], restored])
    return True
