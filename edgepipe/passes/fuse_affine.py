"""Fold multiplications and additions of per-channel constants into the linear operator before.

1. Conv, ConvTranspose, Gemm → Mul or Div by a constant: into weight and bias.
2. Conv, ConvTranspose, Gemm → Add or Sub of a constant: into the bias.
3. MatMul with a constant matrix → Mul or Div by a constant: into the matrix.

The constant has one element, or one per output channel (axis 1, for MatMul and Gemm the last).
The linear operator's result must have no other reader. Chains are folded from the front.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Array, Editor, array_of, is_op, shape_of
from edgepipe.passes.fuse_batchnorm import scale_producer

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def run(edit: Editor) -> int:
    """Returns the number of nodes folded."""
    return sum(_fold(edit, node) for node in edit.nodes("Mul", "Div", "Add", "Sub"))


def _fold(edit: Editor, node: ir.Node) -> bool:
    left, right = node.inputs[:2]
    source, constant, swapped = left, array_of(right), False
    if constant is None:
        source, constant, swapped = right, array_of(left), True
    if constant is None or source is None or not is_op(source.producer(), *_LINEAR):
        return False
    if node.op_type == "Div" and swapped:
        return False
    producer = source.producer()
    assert producer is not None
    values = _per_channel(constant, source, producer.op_type)
    if values is None or shape_of(source) != shape_of(node.outputs[0]):
        edit.note(
            node.name, f"{node.op_type} not folded: its constant is not one value per channel"
        )
        return False
    if source.dtype is None or not source.dtype.is_floating_point():
        return False
    values = values.astype(np.float64)
    factor, offset = np.ones(1), np.zeros(1)
    match node.op_type:
        case "Mul":
            factor = values
        case "Div":
            factor = 1 / values
        case "Add":
            offset = values
        case "Sub":
            offset = values if swapped else -values
            factor = -np.ones(1) if swapped else factor
    reason = scale_producer(edit, source, factor, offset)
    if reason is not None:
        if not (producer.op_type == "MatMul" and node.op_type in ("Add", "Sub")):
            edit.note(node.name, f"{node.op_type} not folded: {reason}")
        return False
    edit.forward(node.outputs[0], source)
    edit.remove(node)
    return True


def _per_channel(constant: Array, source: ir.Value, op_type: str) -> Array | None:
    """The constant as one value per channel (or one in all), or None."""
    if constant.size == 1:
        return constant.reshape(1)
    dims = shape_of(source)
    if dims is None or constant.ndim > len(dims):
        return None
    axis = len(dims) - 1 if op_type in ("Gemm", "MatMul") else 1
    aligned = (1,) * (len(dims) - constant.ndim) + constant.shape
    expected = tuple(d if i == axis else 1 for i, d in enumerate(dims))
    return constant.reshape(-1) if aligned == expected else None
