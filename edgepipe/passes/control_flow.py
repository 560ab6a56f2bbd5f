"""Replace If, Loop and Scan by straight-line code; called by the folding sweep.

1. If with a constant condition: the branch taken is inlined.
2. If with a condition known only at run time: both branches are inlined and Where selects, when
   the results have equal static shapes and no branch divides integers (which could trap).
3. Loop whose number of iterations is known (constant trip count, or a condition that folds to a
   constant in every iteration): unrolled.
4. Loop with a constant largest trip count and a run-time condition, without scan outputs:
   unrolled, with Where keeping the variables once the condition is false.
5. Scan: unrolled; the number of steps is a static dimension.

Unrolling stops at ``MAX_UNROLLED`` nodes; the reason why something stays is noted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Array, Editor, array_of, owner, shape_of

MAX_UNROLLED = 8192

Visit = Callable[[Editor, ir.Node], int]


def replace(edit: Editor, node: ir.Node, visit: Visit) -> bool:
    """Replace ``node`` if one of the cases applies. ``visit`` folds and infers one node."""
    if any(v is not None and not isinstance(v.type, ir.TensorType) for v in node.inputs):
        edit.note(node.name, f"{node.op_type} kept: it carries sequences or optionals")
        return False
    match node.op_type:
        case "If":
            results = _if(edit, node, visit)
        case "Loop":
            results = _loop(edit, node, visit)
        case "Scan":
            results = _scan(edit, node, visit)
        case _:
            return False
    if results is None:
        return False
    for old, new in zip(node.outputs, results, strict=True):
        edit.forward(old, new)
    edit.remove(node)
    return True


def _instantiate(
    edit: Editor, body: ir.Graph, before: ir.Node, arguments: Sequence[ir.Value], visit: Visit
) -> list[ir.Value]:
    """Copy ``body`` in front of ``before`` with its inputs bound; returns its output values."""
    copy = body.clone(allow_outer_scope_values=True)
    bound = dict(zip(copy.inputs, arguments, strict=True))
    outputs = [bound.get(value, value) for value in copy.outputs]
    copy.outputs.clear()
    for value, argument in bound.items():
        value.replace_all_uses_with(argument)
    nodes = list(copy)
    copy.remove(nodes)
    for node in nodes:
        node.name = edit.fresh(f"{before.name}/{node.name}")
        for value in node.outputs:
            if value.name:
                value.name = edit.fresh(f"{before.name}/{value.name}")
    graph = owner(before)
    graph.insert_before(before, nodes)
    # Folding replaces values; these nodes follow the replacement.
    holders = [ir.node("Identity", [value]) for value in outputs]
    graph.insert_before(before, holders)
    for node in nodes:
        if node.graph is not None:
            visit(edit, node)
    results = [holder.inputs[0] for holder in holders]
    graph.remove(holders, safe=True)
    return [value for value in results if value is not None]


def _size(graph: ir.Graph) -> int:
    return sum(1 for _ in graph.all_nodes())


def _if(edit: Editor, node: ir.Node, visit: Visit) -> list[ir.Value] | None:
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    condition = node.inputs[0]
    known = array_of(condition)
    if known is not None:
        return _instantiate(edit, branches[0 if known.reshape(()) else 1], node, [], visit)
    for branch in branches:
        for inner in branch.all_nodes():
            if inner.op_type in ("Div", "Mod"):
                edit.note(node.name, "If kept: a branch divides, and both would be computed")
                return None
    taken, other = (_instantiate(edit, branch, node, [], visit) for branch in branches)
    for a, b in zip(taken, other, strict=True):
        if shape_of(a) is None or shape_of(a) != shape_of(b) or a.dtype != b.dtype:
            edit.note(node.name, "If kept: its branches give different or unknown shapes")
            return None
    selector = edit.insert(node, "Reshape", [condition, edit.constant(np.zeros(0, np.int64))])
    return [edit.insert(node, "Where", [selector, a, b]) for a, b in zip(taken, other, strict=True)]


def _loop(edit: Editor, node: ir.Node, visit: Visit) -> list[ir.Value] | None:
    body = node.attributes["body"].as_graph()
    limit, start = array_of(node.inputs[0]), node.inputs[1]
    states = [value for value in node.inputs[2:] if value is not None]
    count = len(states)
    if node.inputs[0] is not None and limit is None:
        edit.note(node.name, "Loop kept: its trip count is not a constant")
        return None
    trips = MAX_UNROLLED if limit is None else int(limit.reshape(()))
    alive: ir.Value | None = start
    if limit is not None and trips * _size(body) > MAX_UNROLLED:
        edit.note(
            node.name,
            f"Loop kept: {trips} iterations of {_size(body)} nodes are more than {MAX_UNROLLED}",
        )
        return None
    collected: list[list[ir.Value]] = [[] for _ in node.outputs[count:]]
    for trip in range(trips):
        flag = array_of(alive) if alive is not None else np.array(True)
        if flag is not None and not flag.reshape(()):
            break
        if flag is None and (collected or limit is None):
            edit.note(node.name, "Loop kept: when it ends is known only at run time")
            return None
        if trip * _size(body) > MAX_UNROLLED:
            edit.note(node.name, "Loop kept: too long to unroll")
            return None
        index = edit.constant(np.array(trip, np.int64), "iteration")
        truth = edit.constant(np.array(True), "condition")
        results = _instantiate(edit, body, node, [index, truth, *states], visit)
        updated = results[1 : 1 + count]
        if flag is None:
            assert alive is not None
            updated = [
                edit.insert(node, "Where", [alive, new, old])
                for new, old in zip(updated, states, strict=True)
            ]
            alive = edit.insert(node, "And", [alive, results[0]])
        else:
            alive = results[0]
        states = updated
        for values, value in zip(collected, results[1 + count :], strict=True):
            values.append(value)
    stacked = [
        _stack(edit, node, values, 0, False, output)
        for values, output in zip(collected, body.outputs[1 + count :], strict=True)
    ]
    return None if any(v is None for v in stacked) else [*states, *(v for v in stacked if v)]


def _scan(edit: Editor, node: ir.Node, visit: Visit) -> list[ir.Value] | None:
    body = node.attributes["body"].as_graph()
    scanned = node.attributes["num_scan_inputs"].as_int()
    values = [value for value in node.inputs if value is not None]
    states, sequences = values[: len(values) - scanned], values[len(values) - scanned :]
    outs = len(node.outputs) - len(states)
    axes = _per_item(node, "scan_input_axes", scanned)
    reverse = _per_item(node, "scan_input_directions", scanned)
    shapes = [shape_of(value) for value in sequences]
    if any(shape is None for shape in shapes):
        edit.note(node.name, "Scan kept: the shape of an input is not static")
        return None
    steps = (shapes[0] or ())[axes[0]]
    if steps * _size(body) > MAX_UNROLLED:
        edit.note(
            node.name,
            f"Scan kept: {steps} steps of {_size(body)} nodes are more than {MAX_UNROLLED}",
        )
        return None
    collected: list[list[ir.Value]] = [[] for _ in range(outs)]
    for step in range(steps):
        slices = []
        for value, axis, backwards in zip(sequences, axes, reverse, strict=True):
            index = edit.constant(np.array(steps - 1 - step if backwards else step, np.int64))
            slices.append(edit.insert(node, "Gather", [value, index], {"axis": axis}))
        results = _instantiate(edit, body, node, [*states, *slices], visit)
        states = results[: len(states)]
        for items, value in zip(collected, results[len(states) :], strict=True):
            items.append(value)
    out_axes = _per_item(node, "scan_output_axes", outs)
    out_reverse = _per_item(node, "scan_output_directions", outs)
    stacked = [
        _stack(edit, node, items, axis, bool(backwards), output)
        for items, axis, backwards, output in zip(
            collected, out_axes, out_reverse, body.outputs[len(states) :], strict=True
        )
    ]
    return None if any(v is None for v in stacked) else [*states, *(v for v in stacked if v)]


def _per_item(node: ir.Node, name: str, count: int) -> list[int]:
    return list(node.attributes.get_ints(name, ()) or [0] * count)


def _stack(
    edit: Editor,
    before: ir.Node,
    values: list[ir.Value],
    axis: int,
    backwards: bool,
    declared: ir.Value,
) -> ir.Value | None:
    """Per-iteration ``values`` along a new axis; an empty tensor when there are none."""
    if not values:
        dims = shape_of(declared)
        if dims is None or declared.dtype is None:
            edit.note(before.name, f"{before.op_type} kept: no iterations and no known shape")
            return None
        shape = [*dims]
        shape.insert(axis if axis >= 0 else len(dims) + 1 + axis, 0)
        empty: Array = np.zeros(shape, declared.dtype.numpy())
        return edit.constant(empty, "empty")
    place = edit.constant(np.array([axis], np.int64), "axis")
    rows = [edit.insert(before, "Unsqueeze", [value, place]) for value in values]
    if backwards:
        rows.reverse()
    return edit.insert(before, "Concat", rows, {"axis": axis})
