"""New values and nodes of a graph that is rewritten, and the old ones replaced by them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.errors import Unsupported
from edgepipe.lowering.integers.terms import AXES, DOMAIN, META, ZERO, Codes, Integer, Sum, Term
from edgepipe.quantization.edit import Names, initializer
from edgepipe.quantization.graph import Array, constant, dims, is_op, name_of

_KINDS = {"codes": "Requantize", "table": "Table", "multiply": "Mul"}


class Writer:
    """Collects ``nodes``, in order. ``type`` is that of all codes: the target's."""

    def __init__(self, graph: ir.Graph, type: ir.DataType) -> None:
        self.graph, self.type = graph, type
        self.nodes: list[ir.Node] = []
        self.fresh = Names(graph).fresh

    def emit(
        self, total: Sum, multipliers: tuple[Array, ...], limits: tuple[float, float],
        zero: int | None, like: ir.Value, dtype: ir.DataType,
    ) -> ir.Value:  # fmt: skip
        """Write the node of DOMAIN that computes ``total``, shaped like ``like``."""
        term, *rest = total.terms
        residuals = tuple(t.inputs[0] for t in rest)
        value = self.value(like, dtype)
        if zero is not None:
            value.meta[ZERO] = zero
        _check_accumulator(term, total.names)
        kind = _KINDS.get(term.kind)
        source = term.node
        node = ir.Node(
            DOMAIN,
            kind or (source.op_type if source is not None else term.kind),
            [c.value for c in (*term.inputs, *residuals)],
            [] if source is None else source.attributes.values(),
            outputs=[value],
            name=total.names[0] if total.names else name_of(like),
        )
        names = tuple(dict.fromkeys(n for n in total.names if n))
        if is_op(source, "ReduceMean"):  # the axes are an input there
            node.meta[AXES] = _reduced(source)
        node.meta[META] = Integer(term, residuals, multipliers, *limits, zero, names)
        self.nodes.append(node)
        return value

    def linear(self, op_type: str, x: ir.Value, codes: Codes, result: ir.Value, name: str) -> None:
        """Write a QuantizeLinear or DequantizeLinear on the grid of ``codes``."""
        scale = self.constant(codes.scale, "scale")
        zero = self.constant(np.asarray(codes.zero, self.type.numpy()), "zero")
        self.nodes.append(ir.Node("", op_type, [x, scale, zero], outputs=[result], name=name))

    def value(self, like: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A new value of the shape of ``like``."""
        shape = dims(like)
        assert shape is not None
        return ir.Value(
            name=self.fresh(f"{name_of(like)}/{dtype.name.lower()}"),
            shape=ir.Shape(shape),
            type=ir.TensorType(dtype),
        )

    def constant(self, array: Array, hint: str) -> ir.Value:
        """A new initializer."""
        return initializer(self.graph, array, self.fresh(hint))

    def replace_nodes(self) -> None:
        """Put the new nodes, as far as something reads them, in place of the old ones."""
        needed = set(self.graph.outputs)
        kept: list[ir.Node] = []
        for node in reversed(self.nodes):
            if any(v in needed for v in node.outputs):
                kept.append(node)
                needed.update(v for v in node.inputs if v is not None)
        old = [node for node in self.graph if node not in set(kept)]
        for node in old:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        self.graph.remove(list(self.graph))
        self.graph.extend(kept[::-1])
        used = {v for n in self.graph.all_nodes() for v in n.inputs} | set(self.graph.outputs)
        for name, value in list(self.graph.initializers.items()):
            if value not in used:
                del self.graph.initializers[name]


def _reduced(node: ir.Node | None) -> tuple[int, ...]:
    """The axes of a ReduceMean."""
    assert node is not None and node.inputs[0] is not None
    axes = constant(node.inputs[1] if len(node.inputs) > 1 else None)
    if axes is not None:
        return tuple(int(a) for a in axes.reshape(-1))
    return tuple(range(len(dims(node.inputs[0]) or ())))


def _check_accumulator(term: Term, names: tuple[str, ...]) -> None:
    """Refuse a product whose int32 accumulator could overflow."""
    if term.weights is None:
        return
    total = term.weight_sums().max()
    bias = 0 if term.bias is None else np.abs(term.bias.astype(np.float64)).max()
    if total * 255 + bias >= 2**31:
        raise Unsupported(
            "the int32 accumulator could overflow",
            where=names[0] if names else None,
            fix="keep this operator in float with an override",
        )
