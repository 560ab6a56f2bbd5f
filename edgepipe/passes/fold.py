"""Constant folding and shape inference in one sweep, in topological order.

1. A node whose inputs are all constants is computed and becomes an initializer.
2. ``Shape`` and ``Size`` of a value with a static shape become constants.
3. Every other node gets the shapes and dtypes of its outputs; because 1 and 2 happened on the
   way, shape arithmetic (Shape → Gather → Concat → Reshape) is resolved in the same sweep.
4. If, Loop and Scan are replaced by straight-line code where possible (``control_flow``).
5. Not folded: random operators; ``DequantizeLinear`` of integers and 8-bit floats (it marks
   quantized weights); results above 1 MB that are larger than their inputs (Expand, Tile,
   ConstantOfShape), so that folding never blows the weights up.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepipe.passes import control_flow
from edgepipe.passes.editor import Array, Editor, array_of, is_op, shape_of
from edgepipe.passes.evaluate import RANDOM, evaluate

#: Results up to this size are folded whatever the size of the inputs.
MAX_BYTES = 1 << 20


def run(edit: Editor) -> int:
    """Sweep the model once; returns the number of nodes folded."""
    return sweep(edit, edit.model.graph)


def sweep(edit: Editor, graph: ir.Graph) -> int:
    """Fold and infer one graph; bodies of control-flow operators included."""
    return sum(visit(edit, node) for node in list(graph) if node.graph is not None)


def visit(edit: Editor, node: ir.Node) -> int:
    """Fold ``node`` or infer its outputs. Its inputs must have been visited."""
    if edit.before_visit is not None:
        edit.inserted.clear()
        edit.before_visit(node)
        added, edit.inserted = edit.inserted, []
        count = sum(visit(edit, new) for new in added if new.graph is not None)
        if node.graph is None:
            return count
    if is_op(node, "If", "Loop", "Scan") and control_flow.replace(edit, node, visit):
        return 1
    edit.infer(node)
    arrays = _fold(edit, node)
    if arrays is None:
        return 0
    for value, array in zip(node.outputs, arrays, strict=False):
        if value.uses() or value.is_graph_output():
            edit.forward(value, edit.constant(array, f"{value.name}/folded"))
    if not any(value.is_graph_output() for value in node.outputs):  # an Identity that has to stay
        edit.remove(node)
    return 1


def _fold(edit: Editor, node: ir.Node) -> list[Array] | None:
    if is_op(node, "Shape", "Size"):
        return _shape(node)
    if node.domain != "" or node.op_type in RANDOM or not node.outputs:
        return None
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in _attributes(node)):
        return None
    inputs: dict[str, Array] = {}
    for value in node.inputs:
        if value is None:
            continue
        array = array_of(value)
        if array is None:
            return None
        inputs[str(value.name)] = array
    if is_op(node, "Identity") and not node.outputs[0].uses():
        return None  # an output that is a constant: the node has to stay
    if is_op(node, "DequantizeLinear") and node.inputs[0].dtype != ir.DataType.FLOAT4E2M1:  # type: ignore[union-attr]
        return None
    if not _small_enough(edit, node, inputs):
        return None
    return _checked(edit, node, inputs)


def _checked(edit: Editor, node: ir.Node, inputs: dict[str, Array]) -> list[Array] | None:
    arrays = evaluate(node, inputs)
    if arrays is None:
        edit.note(node.name, f"{node.op_type} of constants not folded: no reference for it")
        return None
    named = [value for value in node.outputs if value.name]
    for value, array in zip(named, arrays, strict=True):
        if value.dtype is not None and ir.DataType.from_numpy(array.dtype) != value.dtype:
            edit.note(
                node.name,
                f"{node.op_type} of constants not folded: its result has dtype "
                f"{array.dtype}, expected {value.dtype.name}",
            )
            return None
        known = shape_of(value)
        if known is not None and known != array.shape:
            edit.note(
                node.name,
                f"{node.op_type} of constants not folded: its result has shape "
                f"{array.shape}, expected {known}",
            )
            return None
    return arrays


def _shape(node: ir.Node) -> list[Array] | None:
    dims = shape_of(node.inputs[0])
    if dims is None:
        return None
    if node.op_type == "Size":
        return [np.array(math.prod(dims), np.int64)]
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
    rank = len(dims)
    start = min(max(start + rank if start < 0 else start, 0), rank)
    end = min(max(end + rank if end < 0 else end, 0), rank)
    return [np.array(dims[start:end], np.int64)]


def _small_enough(edit: Editor, node: ir.Node, inputs: dict[str, Array]) -> bool:
    size = 0
    for value in node.outputs:
        dims = shape_of(value)
        if dims is not None and value.dtype is not None:
            size += math.prod(dims) * max(1, int(value.dtype.itemsize))
    if size <= max(MAX_BYTES, sum(array.nbytes for array in inputs.values())):
        return True
    edit.note(
        node.name,
        f"{node.op_type} of constants not folded: its {size >> 20} MB result is larger than "
        "its inputs",
    )
    return False


def _attributes(node: ir.Node) -> list[ir.Attr]:
    return list(node.attributes.values())
