"""Merge and simplify operators that only move data.

1. Reshape → Reshape becomes one Reshape.
2. Transpose → Transpose becomes one Transpose, or nothing.
3. Transpose that moves only axes of size 1 → Reshape.
4. Slice → Slice of different axes becomes one Slice.
5. Concat → Concat along the same axis becomes one Concat, when the first has no other reader.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Editor, array_of, is_op, shape_of


def run(edit: Editor) -> int:
    """Returns the number of nodes changed."""
    count = 0
    for node in edit.nodes("Reshape", "Transpose", "Slice", "Concat"):
        count += _RULES[node.op_type](edit, node)
    return count


def _reshape(edit: Editor, node: ir.Node) -> bool:
    source = node.inputs[0]
    inner = source.producer() if source is not None else None
    if inner is None or not is_op(inner, "Reshape") or inner.graph is not node.graph:
        return False
    node.replace_input_with(0, inner.inputs[0])
    return True


def _transpose(edit: Editor, node: ir.Node) -> bool:
    source, order = node.inputs[0], _order(node)
    inner = source.producer() if source is not None else None
    if inner is not None and is_op(inner, "Transpose") and inner.graph is node.graph:
        first = _order(inner)
        order = [first[axis] for axis in order]
        source = inner.inputs[0]
        edit.become(node, "Transpose", [source], {"perm": order})
    dims, out = shape_of(source), shape_of(node.outputs[0])
    if dims is None or out is None or order == list(range(len(order))):
        return False
    moved = [axis for axis in order if dims[axis] != 1]
    if moved == sorted(moved):
        target = edit.constant(np.array(out, np.int64), f"{node.name}/shape")
        attributes = {"allowzero": 1} if 0 in out else {}
        edit.become(node, "Reshape", [source, target], attributes)
        return True
    return False


def _order(node: ir.Node) -> list[int]:
    order = list(node.attributes.get_ints("perm", ()))
    rank = len(node.outputs[0].shape or ())
    return order or list(range(rank))[::-1]


def _slice(edit: Editor, node: ir.Node) -> bool:
    source = node.inputs[0]
    inner = source.producer() if source is not None else None
    if inner is None or not is_op(inner, "Slice") or inner.graph is not node.graph:
        return False
    parts = [_slice_parts(inner), _slice_parts(node)]
    if parts[0] is None or parts[1] is None:
        return False
    if len(inner.outputs[0].uses()) != 1 or set(parts[0][2]) & set(parts[1][2]):
        return False
    merged = [np.array(a + b, np.int64) for a, b in zip(*parts, strict=True)]
    edit.set_inputs(node, [inner.inputs[0], *(edit.constant(m, "slice") for m in merged)])
    return True


def _slice_parts(node: ir.Node) -> list[list[int]] | None:
    """Starts, ends, axes and steps of a Slice with constants, or None."""
    rank = len(node.outputs[0].shape or ())
    starts, ends = array_of(node.inputs[1]), array_of(node.inputs[2])
    if starts is None or ends is None:
        return None
    parts = [starts.tolist(), ends.tolist(), list(range(len(starts))), [1] * len(starts)]
    for index in (3, 4):
        if len(node.inputs) > index and node.inputs[index] is not None:
            given = array_of(node.inputs[index])
            if given is None:
                return None
            parts[index - 1] = given.tolist()
    parts[2] = [axis % rank for axis in parts[2]]
    return parts


def _concat(edit: Editor, node: ir.Node) -> bool:
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        inner = value.producer() if value is not None else None
        if (
            value is not None
            and inner is not None
            and is_op(inner, "Concat")
            and inner.graph is node.graph
            and len(value.uses()) == 1
            and not value.is_graph_output()
            and inner.attributes.get_int("axis") == node.attributes.get_int("axis")
        ):
            inputs.extend(inner.inputs)
        else:
            inputs.append(value)
    if len(inputs) == len(node.inputs):
        return False
    edit.set_inputs(node, inputs)
    return True


_RULES = {"Reshape": _reshape, "Transpose": _transpose, "Slice": _slice, "Concat": _concat}
