"""Remove operators that return their input unchanged.

1. Identity, and Dropout whose mask nobody reads (inference form).
2. Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile, Slice, Pad, Resize that keep the shape
   (for Slice, Pad and Resize that means: every element stays where it was).
3. Transpose that keeps the order; Cast to the same dtype.
4. Concat, Sum, Mean, Max, Min of one input; Concat inputs without elements are left out.
5. Split into one part.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Editor, array_of, shape_of

_SAME_SHAPE = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile")


def run(edit: Editor) -> int:
    """Returns the number of nodes removed."""
    count = 0
    for node in edit.nodes():
        if node.domain == "" and node.op_type in ("Concat",):
            _drop_empty(edit, node)
        if _unchanged(node) and _bypass(edit, node):
            count += 1
    return count


def _bypass(edit: Editor, node: ir.Node) -> bool:
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if output.is_graph_output() and (
        source.producer() is None or source.is_graph_output() or source.graph is not node.graph
    ):
        if node.op_type != "Identity":
            edit.become(node, "Identity", [source])
        return False
    edit.forward(output, source)
    edit.remove(node)
    return True


def _unchanged(node: ir.Node) -> bool:
    if node.domain != "" or not node.inputs or node.inputs[0] is None:
        return False
    source, output = node.inputs[0], node.outputs[0]
    before, after = shape_of(source), shape_of(output)
    match node.op_type:
        case "Identity":
            return source.type is None or isinstance(source.type, ir.TensorType)
        case "Dropout":
            training = node.inputs[2] if len(node.inputs) > 2 else None
            array = array_of(training)
            off = training is None or (array is not None and not bool(array.any()))
            return off and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
        case op if op in _SAME_SHAPE:
            return before is not None and before == after
        case "Slice":
            return before is not None and before == after and _steps_forward(node)
        case "Pad":
            pads = array_of(node.inputs[1])
            return pads is not None and not pads.any()
        case "Transpose":
            order = node.attributes.get_ints("perm", ())
            rank = len(source.shape) if source.shape is not None else -1
            return list(order) == list(range(rank)) or rank in (0, 1)
        case "Cast":
            return source.dtype is not None and int(source.dtype) == node.attributes.get_int("to")
        case "Concat" | "Sum" | "Mean" | "Max" | "Min":
            return len(node.inputs) == 1
        case "Split":
            return len(node.outputs) == 1
    return False


def _steps_forward(node: ir.Node) -> bool:
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = array_of(node.inputs[4])
    # The shape is kept: a negative step would reverse, a larger one shrinks all but single rows.
    dims = shape_of(node.inputs[0]) or ()
    axes = array_of(node.inputs[3])
    if steps is None or (node.inputs[3] is not None and axes is None):
        return False
    chosen = np.arange(len(steps)) if axes is None else axes
    return all(s > 0 or dims[int(a)] == 1 for s, a in zip(steps, chosen, strict=True))


def _drop_empty(edit: Editor, node: ir.Node) -> None:
    axis = node.attributes.get_int("axis", 0)
    kept = []
    for value in node.inputs:
        dims = shape_of(value)
        if dims is None or dims[axis] != 0:
            kept.append(value)
    if kept and len(kept) != len(node.inputs):
        edit.set_inputs(node, kept)
