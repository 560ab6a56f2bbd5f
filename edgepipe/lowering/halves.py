"""Row-major values that lie in memory as halves, where a target keeps float activations so.

Images do by their layout (``layouts``); this is about what matrix products, softmax and layer
normalisation write and read. A value becomes FLOAT16 where everything that reads it can:

1. products, softmax, layer normalisation and kernels over images read either type;
2. nodes that move elements, or scale and shift them by constants, take the type along with them:
   all that they read and write changes together, their constants too.

Everything else, and the network's own inputs and outputs, stay float32; the kernel at the border
converts. Sums, exponentials and means are float32 in all kernels.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.lowering.elementwise import constant
from edgepipe.lowering.groups import Group, is_float

_MOVES = frozenset(
    {"Concat", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose"}
    | {"Unsqueeze"}
)
#: Of two floats, one of them constant.
_SHIFTS = frozenset({"Add", "Div", "Mul", "Sub"})
_PLAIN = frozenset({"matmul", "rows"})
_LARGEST = float(np.finfo(np.float16).max)
_PRECISION = float(np.finfo(np.float16).eps)


def store(graph: ir.Graph, groups: list[Group], context: Context) -> None:
    """Retype the values of ``graph`` that become halves, and constants of nodes that move them.

    In place; ``groups`` are those of the graph. Without effect for other targets and recipes.
    """
    if not context.target.halves(context.recipe):
        return
    inside = {node: group for group in groups for node in group.nodes}
    taking = [node for node in graph if node not in inside and _follows(node)]
    chosen = {group.output for group in groups if group.blocked or group.kind in _PLAIN}
    chosen |= {value for node in taking for value in node.outputs}
    chosen = {value for value in chosen if is_float(value)} - set(graph.outputs)
    while lost := {v for v in chosen if not _stays(v, chosen, inside)}:
        chosen -= lost
    for value in chosen:
        value.dtype = ir.DataType.FLOAT16
    halves: dict[ir.Value, ir.Value] = {}
    for node in taking:
        if node.outputs[0] in chosen:
            _convert_constants(graph, node, halves)


def _floats(node: ir.Node) -> Iterable[ir.Value]:
    """Inputs whose elements ``node`` moves."""
    every = node.op_type == "Concat" or node.op_type in _SHIFTS
    inputs = node.inputs if every else node.inputs[:1]
    return [value for value in inputs if value is not None]


def _follows(node: ir.Node) -> bool:
    """Whether ``node`` can work on halves, its constants among them."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in _MOVES | _SHIFTS:
        return False
    arrays = [constant(value) for value in _floats(node)]
    fixed = [array for array in arrays if array is not None]
    if node.op_type in _SHIFTS and len(fixed) != 1:
        return False
    return len(fixed) < len(arrays) and all(map(_fits, fixed))


def _fits(array: np.ndarray) -> bool:
    """Whether ``array`` as halves loses no more than their last bit, as a whole."""
    if array.dtype != np.float32 or (np.abs(array) > _LARGEST).any():
        return False
    exact = array.astype(np.float64)
    error = np.linalg.norm(exact - array.astype(np.float16))
    return bool(error <= _PRECISION * np.linalg.norm(exact))


def _stays(value: ir.Value, chosen: set[ir.Value], inside: dict[ir.Node, Group]) -> bool:
    """Whether ``value`` may be halves, given that ``chosen`` are."""
    source = value.producer()
    if source is not None and source not in inside:
        moved = [v for v in _floats(source) if constant(v) is None]
        if not {*moved, *source.outputs} <= chosen:
            return False
    for use in value.uses():
        group = inside.get(use.node)
        if group is None:
            if not _follows(use.node) or not chosen.issuperset(use.node.outputs):
                return False
        elif group.kind == "integer":
            return False
    return True


def _convert_constants(graph: ir.Graph, node: ir.Node, halves: dict[ir.Value, ir.Value]) -> None:
    moved = set(_floats(node))
    for index, value in enumerate(node.inputs):
        array = constant(value) if value in moved else None
        if value is None or array is None:
            continue
        if value not in halves:
            tensor = ir.tensor(array.astype(np.float16), name=f"{value.name}/halves")
            halves[value] = ir.Value(
                name=tensor.name, shape=value.shape, type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )  # fmt: skip
            graph.register_initializer(halves[value])
        node.replace_input_with(index, halves[value])
