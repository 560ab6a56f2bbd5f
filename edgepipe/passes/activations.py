"""Recognise activation functions in whatever way an exporter spelt them.

1. Clip without effective bounds is removed; Clip at 0 → Relu; Max(x, 0) → Relu; Relu or Clip
   after Relu or Clip become one; Min(Max(x, a), b) → Clip.
2. A group of elementwise operators that is a function of one value only, and equals a known
   activation, becomes that operator: Gelu (erf and tanh), HardSwish, HardSigmoid(1/6, 1/2),
   Mish, Softplus, Sigmoid.
3. x · Sigmoid(x) stays this pair: Swish is newer than the canonical opset.

Case 2 compares numbers, not shapes of graphs: the group is evaluated in float64 on points that
cover the curved part and both tails, and must agree everywhere to float32 accuracy. So every
order of operands and every way to write the constants is recognised, and nothing else is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Array, Editor, array_of, is_op, only_user, owner, scalar_of

_POINTS: Array = np.concatenate([np.linspace(-9, 9, 145), [-60, -25, -14, -1e-3, 1e-3, 14, 25, 60]])
_TOLERANCE = 2e-6
_LARGEST_GROUP = 14


def _erf(x: Array) -> Array:
    return np.array([math.erf(v) for v in x.ravel()]).reshape(x.shape)


def _softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


# Elementwise operators a group may consist of, in float64.
_EVALUATE: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Exp": np.exp,
    "Log": np.log,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Abs": np.abs,
    "Tanh": np.tanh,
    "Erf": _erf,
    "Sigmoid": _sigmoid,
    "Softplus": _softplus,
    "Relu": lambda x: np.maximum(x, 0),
    "Max": np.maximum,
    "Min": np.minimum,
    "Clip": lambda x, low=-np.inf, high=np.inf: np.clip(x, low, high),
}
_ELEMENTWISE = (*_EVALUATE, "HardSigmoid")
_CURVED = frozenset(("Erf", "Tanh", "Exp", "Sigmoid", "Softplus", "Clip", "Relu", "HardSigmoid"))

# Operator, attributes, and what it computes.
_KNOWN: tuple[tuple[str, dict[str, object], Callable[[Array], Array]], ...] = (
    ("Gelu", {}, lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2)))),
    (
        "Gelu",
        {"approximate": "tanh"},
        lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    ("HardSwish", {}, lambda x: x * np.clip(x + 3, 0, 6) / 6),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, lambda x: np.clip(x + 3, 0, 6) / 6),
    ("Mish", {}, lambda x: x * np.tanh(_softplus(x))),
    ("Softplus", {}, _softplus),
    ("Sigmoid", {}, _sigmoid),
)


def run(edit: Editor) -> int:
    """Returns the number of activations rewritten."""
    count = sum(_bounds(edit, node) for node in edit.nodes("Clip", "Max", "Min", "Relu"))
    for graph in list(edit.model.graphs()):
        # From the end, so that the largest group is seen first.
        for node in reversed(list(graph)):
            if node.graph is not None and is_op(node, *_ELEMENTWISE):
                count += _recognise(edit, node)
    return count


def _bounds(edit: Editor, node: ir.Node) -> bool:
    limits = _limits(node)
    source = node.inputs[0]
    if limits is None or source is None or source.dtype is None:
        return False
    low, high = limits
    before = source.producer()
    if before is not None and only_user(source) is node:
        inner = _limits(before)
        # Clip applies the lower bound first: the order of two clips matters only if they cross.
        if inner is not None and max(low, inner[0]) <= min(high, inner[1]):
            low, high = max(low, inner[0]), min(high, inner[1])
            source = before.inputs[0]
    assert source is not None and source.dtype is not None
    if low > high:
        return False
    if (low, high) == (-math.inf, math.inf):
        edit.become(node, "Identity", [source])
        return True
    op = "Relu" if (low, high) == (0, math.inf) and source.dtype.is_floating_point() else "Clip"
    if node.op_type == op and node.inputs[0] is source:
        return False
    dtype = source.dtype.numpy()
    bounds = [
        edit.constant(np.array(bound).astype(dtype), f"{node.name}/bound")
        if math.isfinite(bound)
        else None
        for bound in (low, high)
    ]
    edit.become(node, op, [source, *(bounds if op == "Clip" else [])])
    return True


def _limits(node: ir.Node) -> tuple[float, float] | None:
    """(lowest, highest) value that a bounding operator of constants lets through, or None."""
    if is_op(node, "Relu"):
        return 0.0, math.inf
    if is_op(node, "Max", "Min") and len(node.inputs) == 2:
        bound = scalar_of(node.inputs[1])
        rank = len(node.inputs[0].shape or ()) if node.inputs[0] is not None else 0
        if bound is None or rank < len(node.inputs[1].shape or ()):  # type: ignore[union-attr]
            return None
        return (bound, math.inf) if node.op_type == "Max" else (-math.inf, bound)
    if not is_op(node, "Clip"):
        return None
    low, high = -math.inf, math.inf
    given = [*node.inputs[1:], None, None]
    if given[0] is not None:
        value = scalar_of(given[0])
        if value is None:
            return None
        low = value
    if given[1] is not None:
        value = scalar_of(given[1])
        if value is None:
            return None
        high = value
    return low, high


def _recognise(edit: Editor, root: ir.Node) -> bool:
    group = _group(root)
    if not any(node.op_type in _CURVED for node in group):
        return False
    for source in _sources(group):
        nodes = _between(root, source, set(group))
        if nodes is None or len(nodes) < 2 or source.shape != root.outputs[0].shape:
            continue
        if source.dtype != root.outputs[0].dtype:
            continue
        values = _curve(nodes, root, source)
        if values is None:
            continue
        for op_type, attributes, function in _KNOWN:
            with np.errstate(all="ignore"):
                expected = function(_POINTS)
            if np.all(np.abs(values - expected) <= _TOLERANCE * np.maximum(1, np.abs(expected))):
                edit.become(root, op_type, [source], attributes)
                return True
    return False


def _function(node: ir.Node) -> Callable[..., Array]:
    if node.op_type != "HardSigmoid":
        return _EVALUATE[node.op_type]
    alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
    return lambda x: np.clip(alpha * x + beta, 0, 1)


def _group(root: ir.Node) -> dict[ir.Node, None]:
    """``root`` and the elementwise nodes above it that only feed this group, nearest first."""
    group = {root: None}
    frontier = [root]
    while frontier and len(group) < _LARGEST_GROUP:
        for value in frontier.pop(0).inputs:
            node = value.producer() if value is not None else None
            if value is None or node is None or node in group or not is_op(node, *_ELEMENTWISE):
                continue
            if node.graph is not owner(root) or value.is_graph_output():
                continue
            if all(user in group for user, _ in value.uses()):
                group[node] = None
                frontier.append(node)
    return group


def _sources(group: Iterable[ir.Node]) -> list[ir.Value]:
    """Values that could be the group's argument, those furthest from the root first."""
    values: dict[ir.Value, None] = {}
    for node in group:
        for value in node.inputs:
            if value is not None and array_of(value) is None:
                values[value] = None
    return list(values)[::-1]


def _between(root: ir.Node, source: ir.Value, group: set[ir.Node]) -> list[ir.Node] | None:
    """Nodes from ``source`` to ``root`` in topological order, if ``source`` is the only input."""
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()

    def add(node: ir.Node) -> bool:
        seen.add(node)
        for value in node.inputs:
            if value is None or value is source or scalar_of(value) is not None:
                continue
            producer = value.producer()
            if producer is None or producer not in group:
                return False
            if producer not in seen and not add(producer):
                return False
        order.append(node)
        return True

    return order if add(root) else None


def _curve(nodes: list[ir.Node], root: ir.Node, source: ir.Value) -> Array | None:
    """The values of the group on ``_POINTS``."""
    known: dict[ir.Value, Array] = {source: _POINTS}
    with np.errstate(all="ignore"):
        for node in nodes:
            arguments: list[Array] = []
            for value in node.inputs:
                if value is None:
                    arguments.append(np.array(-np.inf if len(arguments) == 1 else np.inf))
                elif value in known:
                    arguments.append(known[value])
                else:
                    arguments.append(np.array(scalar_of(value), np.float64))
            known[node.outputs[0]] = _function(node)(*arguments)
    values = known[root.outputs[0]]
    return values if np.isfinite(values).all() else None
