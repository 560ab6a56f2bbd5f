"""Enlarge late: what computes every pixel alone comes before a nearest-neighbour enlargement.

1. Resize (nearest, not along channels, to no fewer pixels), read by a pointwise Conv alone (kernel
   and strides of 1, no pads) that has no more output channels than inputs → Conv, Resize.
2. The same Resize, read by Relu, Clip, LeakyRelu, HardSwish, Sigmoid or Tanh alone → in that order.

Values are the same to the bit, computed of fewer pixels.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Editor, array_of, is_op, only_user, owner, shape_of

_UNARY = ("Relu", "Clip", "LeakyRelu", "HardSwish", "Sigmoid", "Tanh")


def run(edit: Editor) -> int:
    """Returns the number of nodes that were moved."""
    count = 0
    for node in edit.nodes("Resize"):
        while (reader := _movable(edit, node)) is not None:
            _move(edit, node, reader)
            count += 1
    return count


def _movable(edit: Editor, resize: ir.Node) -> ir.Node | None:
    """The only reader of ``resize`` where it may come first."""
    reader = only_user(resize.outputs[0])
    before, after = shape_of(resize.inputs[0]), shape_of(resize.outputs[0])
    if reader is None or before is None or after is None or not is_op(reader, "Conv", *_UNARY):
        return None
    if reader.inputs[0] is not resize.outputs[0]:
        return None
    reason = _refusal(resize, reader, before, after)
    if reason:
        edit.note(resize.name, f"Resize stays before {reader.op_type}: {reason}")
    return None if reason else reader


def _refusal(
    resize: ir.Node, reader: ir.Node, before: tuple[int, ...], after: tuple[int, ...]
) -> str:
    mode = resize.attributes.get_string("mode", "nearest")
    if mode != "nearest":
        return f"its mode is {mode}"
    coordinates = "coordinate_transformation_mode"
    if resize.attributes.get_string(coordinates, "half_pixel") == "tf_crop_and_resize":
        return "it may write a value of its own"
    if before[:2] != after[:2]:
        return "it is not along height and width alone"
    if is_op(resize.inputs[0].producer(), "DequantizeLinear"):  # type: ignore[union-attr]
        return "its input is quantized"
    if math.prod(after) < math.prod(before):
        return "it makes the image smaller"
    if any(value is not None and array_of(value) is None for value in reader.inputs[1:]):
        return "its parameters are computed"
    if not is_op(reader, "Conv"):
        return ""
    weight, attributes = shape_of(reader.inputs[1]), reader.attributes
    assert weight is not None
    pads = attributes.get_ints("pads", ()) or ()
    strides = attributes.get_ints("strides", ()) or ()
    if any(k != 1 for k in weight[2:]) or any(pads) or any(s != 1 for s in strides):
        return "it is not pointwise"
    if attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "auto_pad is not resolved"
    return "it has more channels out than in" if weight[0] > before[1] else ""


def _move(edit: Editor, resize: ir.Node, reader: ir.Node) -> None:
    graph, made = owner(reader), reader.outputs[0]
    graph.remove(reader)
    graph.insert_before(resize, reader)
    reader.replace_input_with(0, resize.inputs[0])
    resize.replace_input_with(0, made)
    made.shape = resize.outputs[0].shape = None
    edit.infer(reader)
    sizes = array_of(resize.inputs[3]) if len(resize.inputs) > 3 else None
    if sizes is not None and "axes" not in resize.attributes:
        sizes = np.array(sizes)
        sizes[1] = (shape_of(made) or ())[1]
        resize.replace_input_with(3, edit.constant(sizes, f"{resize.name}/sizes"))
    edit.infer(resize)
    edit.forward(made, resize.outputs[0])
