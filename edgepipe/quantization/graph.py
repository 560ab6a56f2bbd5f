"""Small questions about an onnx_ir graph that every stage of quantization asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepipe.errors import UserError

Array = NDArray[Any]


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of these standard operators."""
    return node is not None and node.domain == "" and node.op_type in op_types


def constant(value: ir.Value | None) -> Array | None:
    """The array of a constant, or None. Read-only by agreement: weights are shared."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def dynamic(value: ir.Value | None) -> bool:
    """Whether ``value`` is a float tensor computed at run time."""
    return value is not None and value.const_value is None and value.dtype == ir.DataType.FLOAT


def dims(value: ir.Value) -> tuple[int, ...] | None:
    """The static shape, or None where a dimension is unknown."""
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def name_of(value: ir.Value) -> str:
    """The name of a value; canonical graphs name every one."""
    assert value.name, "a canonical graph names every value"
    return value.name


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads ``value`` once, or None if others read it or it is an output."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def bounds(node: ir.Node) -> tuple[float, float] | None:
    """Range of a Relu or of a Clip with constant bounds; None for anything else."""
    if is_op(node, "Relu"):
        return 0.0, np.inf
    if not is_op(node, "Clip"):
        return None
    found = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        array = constant(value)
        if value is not None and array is None:
            return None
        found.append(default if array is None else float(array.reshape(())))
    return found[0], found[1]


def outer_values(node: ir.Node) -> list[ir.Value]:
    """All values a node reads: its inputs, and what its subgraphs take from outside."""
    found = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        graphs: list[ir.Graph] = []
        if attribute.type == ir.AttributeType.GRAPH:
            graphs = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs = list(attribute.as_graphs())
        for graph in graphs:
            inside = {v for n in graph for v in n.outputs} | set(graph.inputs)
            inside |= set(graph.initializers.values())
            for inner in graph:
                found += [v for v in outer_values(inner) if v not in inside]
    return found


def code_range(node: ir.Node) -> tuple[float, float] | None:
    """Floats that the ends of a per-tensor QuantizeLinear's codes stand for; None where scale or
    zero point are no constants or there are several."""
    scale = constant(node.inputs[1])
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    zero = np.zeros((), np.uint8) if zero_value is None else constant(zero_value)
    if scale is None or zero is None or scale.size != 1:
        return None
    kind = zero_value.dtype if zero_value is not None else ir.DataType.UINT8
    if kind is None or kind.bitwidth > 8 or not kind.is_integer():
        return None
    low = -(2 ** (kind.bitwidth - 1)) if kind.is_signed() else 0
    high = low + 2**kind.bitwidth - 1
    step, middle = float(scale.reshape(())), int(zero.reshape(()))
    return (low - middle) * step, (high - middle) * step


def check_filled(graph: ir.Graph) -> None:
    """Raise UserError where a float of ``graph`` that is computed is empty: it says nothing."""
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        shape = dims(value)
        if shape is not None and 0 in shape and value.dtype == ir.DataType.FLOAT:
            raise UserError(
                f"tensor '{value.name}' is empty, {list(shape)}",
                where="calibration",
                fix="use a float recipe, and without data if it prunes",
            )
