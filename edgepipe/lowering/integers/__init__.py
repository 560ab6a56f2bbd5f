"""From a Q/DQ graph to one that computes in integers, for kernels that do.

``fold`` reads the graph as the integer interpreter does (``read``), and writes a node of DOMAIN
wherever something is rounded, or leaves the integers as float32: a convolution with its bias,
residual, activation and requantisation is one node. Codes keep one type throughout, the one that
the target's instructions want; operators that only move values run on codes. What has no integer
form stays as it was, on dequantised values: a float island.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.errors import Unsupported, UserError
from edgepipe.lowering.integers import read
from edgepipe.lowering.integers.terms import (
    AXES,
    DOMAIN,
    META,
    ZERO,
    Codes,
    Integer,
    Sum,
    Term,
    Weights,
    integer_of,
)
from edgepipe.quantization import interpreter
from edgepipe.quantization.graph import Array, constant, dims, is_op, name_of
from edgepipe.quantization.placement import AVERAGES, BINARY

__all__ = ["DOMAIN", "fold", "integer_of"]

STAGE = "lowering.integers"


def fold(model: ir.Model, context: Context) -> None:
    """Rewrite ``model`` in place; a graph without QuantizeLinear stays as it is."""
    if any(is_op(node, "QuantizeLinear") for node in model.graph):
        _Folder(model.graph, context).run()


class _Folder:
    def __init__(self, graph: ir.Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        signed = context.target.integer.activations == "int8"
        self.type = ir.DataType.INT8 if signed else ir.DataType.UINT8
        self.sums: dict[ir.Value, Sum] = {}
        self.weights: dict[ir.Value, Weights] = {}
        self.codes: dict[ir.Value, Codes] = {}  # by the output of the QuantizeLinear
        self.floats: dict[ir.Value, ir.Value] = {}
        self.nodes: list[ir.Node] = []
        self.fallbacks: list[ir.Node] = []
        self.names = {v.name for n in graph.all_nodes() for v in n.outputs} | {*graph.initializers}
        self.names |= {v.name for v in graph.inputs}

    def run(self) -> None:
        for node in list(self.graph):
            self._node(node)
        for index, value in enumerate(self.graph.outputs):
            self._output(index, value)
        self._refuse_fallbacks()
        self._replace_nodes()

    # -- one node -----------------------------------------------------------------------------

    def _node(self, node: ir.Node) -> None:
        if is_op(node, "DequantizeLinear") and self._dequantize(node):
            return
        if is_op(node, "QuantizeLinear") and _per_tensor(node):
            self._quantize(node)
            return
        operands = [self._operand(value) for value in node.inputs]
        result = read.combine(node, operands) if node.domain == "" else None
        if result is not None:
            self.sums[node.outputs[0]] = result
        elif node.domain == "" and (moved := read.moves(node, operands)) is not None:
            self._move(node, moved)
        else:
            self._keep(node, operands)

    def _refuse_fallbacks(self) -> None:
        """A quantized operator that computes in float must not go unnoticed."""
        if not self.fallbacks:
            return
        names = ", ".join(f"{n.op_type} '{n.name}'" for n in self.fallbacks[:3])
        more = len(self.fallbacks) - 3
        text = f"no integer form for {names}" + (f" and {more} more" if more > 0 else "")
        if not self.context.allow_float_fallback:
            raise UserError(
                f"{text}: quantized operators would compute in float",
                where="--recipe",
                fix="allow it with --allow-float-fallback, or keep them float with an override",
            )
        self.context.warn(STAGE, self.fallbacks[0].name, f"{text}: they compute in float")

    def _operand(self, value: ir.Value | None) -> read.Operand:
        if value is None:
            return None
        return self.sums.get(value) or self.weights.get(value)

    def _keep(self, node: ir.Node, operands: list[read.Operand]) -> None:
        """Leave a node as it is, on floats."""
        if any(isinstance(x, Sum) for x in operands):
            self.context.note(STAGE, node.name, f"{node.op_type} computes in float")
        if any(isinstance(x, Sum) and x.codes is not None for x in operands) and is_op(
            node, *read.LINEAR, *AVERAGES, *BINARY
        ):
            self.fallbacks.append(node)
        for index, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(index, self._float(value))
        self.nodes.append(node)

    def _dequantize(self, node: ir.Node) -> bool:
        """Note what a DequantizeLinear stands for; False where it has to be computed."""
        source, scale = node.inputs[0], constant(node.inputs[1])
        assert source is not None
        zero = constant(node.inputs[2] if len(node.inputs) > 2 else None)
        if (
            scale is None
            or node.attributes.get_int("block_size", 0) != 0
            or scale.dtype != np.float32
        ):
            return False
        array = constant(source)
        if array is not None:
            axis = node.attributes.get_int("axis", 1) % max(array.ndim, 1)
            integers = array.astype(np.int32)
            if zero is not None and zero.any():
                shape = [1] * array.ndim
                shape[axis] = -1
                integers = integers - zero.astype(np.int32).reshape(shape if zero.ndim else ())
            self.weights[node.outputs[0]] = Weights(integers, scale, axis)
            self.nodes.append(node)  # for float readers; dropped when there are none
            return True
        if scale.size != 1 or source.dtype not in read.LOWEST:
            return False
        scale, offset = scale.reshape(()), 0 if zero is None else int(zero.reshape(()))
        codes = self.codes.get(source) or self._recoded(source, scale, offset)
        term = Term("codes", (codes,), codes.scale)
        self.sums[node.outputs[0]] = Sum((term,))
        return True

    def _recoded(self, source: ir.Value, scale: Array, zero: int) -> Codes:
        """Codes that come from outside, in the target's type."""
        outside = Codes(source, scale, zero)
        if source.dtype == self.type:
            return outside
        return self._round(Sum((Term("codes", (outside,), scale),)), scale, zero, source, None)

    def _quantize(self, node: ir.Node) -> None:
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None and output.dtype is not None
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        assert scale is not None and zero is not None
        scale, offset = scale.reshape(()), int(zero.reshape(()))
        total = self.sums.get(source)
        if total is not None and total.codes is not None:
            there = total.codes
            if there.same_grid(scale, offset + self._shift(output.dtype)):
                self.codes[output] = there  # rounding to the grid it is on
                self._foreign(output, there, offset)
                return
        if total is None or not self._representable(total):
            self.codes[output] = self._quantize_float(node, source, scale, offset)
        else:
            self.codes[output] = self._round(total, scale, offset, output, node.name)
        self._foreign(output, self.codes[output], offset)

    @staticmethod
    def _representable(total: Sum) -> bool:
        """One addend of any kind that comes first or can, the others tensors of codes."""
        kinds = [term.kind for term in total.terms]
        if len(kinds) == 1:
            return True
        others = kinds[1:] if len(kinds) > 2 else sorted(kinds, key=lambda k: k == "codes")[1:]
        return "table" not in kinds and all(kind == "codes" for kind in others)

    def _shift(self, dtype: ir.DataType) -> int:
        """What is added to codes of ``dtype`` to make them codes of the target's type."""
        return read.LOWEST[self.type] - read.LOWEST[dtype]

    def _foreign(self, output: ir.Value, codes: Codes, zero: int) -> None:
        """Serve readers of codes that are no DequantizeLinear: they see the original type."""
        readers = [use for use in output.uses() if not is_op(use.node, "DequantizeLinear")]
        if not readers and not output.is_graph_output():
            return
        plain = codes.value
        if codes.value.dtype != output.dtype or output.is_graph_output():
            assert output.dtype is not None
            term = Term("codes", (codes,), codes.scale)
            plain = self._emit(
                Sum((term,), names=(f"{output.name} as {output.dtype.name.lower()}",)),
                (np.ones((), np.float32),), (-np.inf, np.inf), zero, output, output.dtype,
            )  # fmt: skip
        for use in readers:
            use.node.replace_input_with(use.idx, plain)
        self.floats[output] = plain

    def _move(self, node: ir.Node, codes: list[Codes]) -> None:
        """Run a movement operator on codes."""
        for index, c in enumerate(codes):
            node.replace_input_with(index, c.value)
        if is_op(node, "Pad") and node.attributes.get_string("mode", "constant") == "constant":
            if len(node.inputs) < 3:
                node.resize_inputs(3)
            dtype = self.type.numpy()
            node.replace_input_with(2, self._constant(np.asarray(codes[0].zero, dtype), "fill"))
        for value in node.outputs:
            value.type = ir.TensorType(self.type)
            value.meta[ZERO] = codes[0].zero
            moved = Codes(value, codes[0].scale, codes[0].zero)
            self.sums[value] = Sum((Term("codes", (moved,), moved.scale),))
        self.nodes.append(node)

    # -- new nodes ----------------------------------------------------------------------------

    def _round(
        self, total: Sum, scale: Array, zero: int, output: ir.Value, name: str | None
    ) -> Codes:
        """Codes of ``total`` on the grid (scale, zero), in the target's type."""
        assert output.dtype is not None
        low, high = interpreter.INT_LIMITS[output.dtype]
        first, last = low - zero, high - zero
        if total.low > -np.inf:
            first = max(first, int(np.rint(np.float32(total.low) / scale)))
        if total.high < np.inf:
            last = min(last, int(np.rint(np.float32(total.high) / scale)))
        moved = zero + self._shift(output.dtype)
        if total.terms[0].kind == "table":
            return self._look_up(total, scale, (first, last), moved, output)
        terms = _ordered(total.terms)
        multipliers = tuple(np.asarray(t.scale / scale, np.float32) for t in terms)
        whole = Sum(terms, names=(*total.names, name) if name else total.names)
        value = self._emit(whole, multipliers, (first, last), moved, output, self.type)
        return Codes(value, scale, moved)

    def _look_up(
        self, total: Sum, scale: Array, limits: tuple[int, int], zero: int, output: ir.Value
    ) -> Codes:
        """A function of one tensor of codes: all 256 results, rounded now."""
        term = total.terms[0]
        assert term.table is not None
        asked = interpreter.Sum((interpreter.Term(term.table, term.scale),))
        codes = interpreter.requantize(asked, scale, 0, *limits) + np.int32(zero)
        table = codes.astype(self.type.numpy())
        inner = read.table_of(term.inputs[0])
        source = term.inputs[0]
        if inner is not None:  # a table of a table
            source, table = inner[0], table[inner[1].astype(np.int32) - read.LOWEST[self.type]]
        folded = Term("table", (source,), term.scale, term.node, table=table)
        value = self._emit(Sum((folded,), names=total.names), (), limits, zero, output, self.type)
        value.meta[read.TABLE] = (source, table)
        return Codes(value, scale, zero)

    def _quantize_float(self, node: ir.Node, source: ir.Value, scale: Array, zero: int) -> Codes:
        output = node.outputs[0]
        assert output.dtype is not None
        moved = zero + self._shift(output.dtype)
        value = self._value(output, self.type)
        value.meta[ZERO] = moved
        inputs = [
            self._float(source),
            self._constant(scale, "scale"),
            self._constant(np.asarray(moved, self.type.numpy()), "zero"),
        ]
        name = node.name or "QuantizeLinear"
        self.nodes.append(ir.Node("", "QuantizeLinear", inputs, outputs=[value], name=name))
        return Codes(value, scale, moved)

    def _float(self, value: ir.Value) -> ir.Value:
        """``value`` in float, for those who compute in float."""
        if value in self.floats:
            return self.floats[value]
        total = self.sums.get(value)
        if total is None:
            return value
        codes = total.codes
        if codes is not None:
            result = self._dequantized(value, codes)
        elif self._representable(total) and total.terms[0].kind != "table":
            terms = _ordered(total.terms)
            scales = tuple(t.scale for t in terms)
            whole = Sum(terms, names=total.names)
            limits = (total.low, total.high)
            result = self._emit(whole, scales, limits, None, value, ir.DataType.FLOAT)
        else:
            result = self._recomputed(value)
        self.floats[value] = result
        return result

    def _dequantized(self, value: ir.Value, codes: Codes) -> ir.Value:
        result = self._value(value, ir.DataType.FLOAT)
        inputs = [
            codes.value,
            self._constant(codes.scale, "scale"),
            self._constant(np.asarray(codes.zero, self.type.numpy()), "zero"),
        ]
        name = f"{name_of(value)}/float"
        self.nodes.append(ir.Node("", "DequantizeLinear", inputs, outputs=[result], name=name))
        return result

    def _recomputed(self, value: ir.Value) -> ir.Value:
        """The operator itself in float: what its readers need has no single accumulator."""
        node = value.producer()
        assert node is not None
        self.context.note(STAGE, node.name, f"{node.op_type} computes in float for some readers")
        result = self._value(value, ir.DataType.FLOAT)
        inputs = [None if v is None else self._float(v) for v in node.inputs]
        copied = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(), outputs=[result],
            name=node.name,
        )  # fmt: skip
        self.nodes.append(copied)
        return result

    def _emit(
        self, total: Sum, multipliers: tuple[Array, ...], limits: tuple[float, float],
        zero: int | None, like: ir.Value, dtype: ir.DataType,
    ) -> ir.Value:  # fmt: skip
        term, *rest = total.terms
        residuals = tuple(t.inputs[0] for t in rest)
        value = self._value(like, dtype)
        if zero is not None:
            value.meta[ZERO] = zero
        _check_accumulator(term, total.names)
        kind = {"codes": "Requantize", "table": "Table", "multiply": "Mul"}.get(term.kind)
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

    def _value(self, like: ir.Value, dtype: ir.DataType) -> ir.Value:
        shape = dims(like)
        assert shape is not None
        return ir.Value(
            name=self._fresh(f"{name_of(like)}/{dtype.name.lower()}"),
            shape=ir.Shape(shape),
            type=ir.TensorType(dtype),
        )

    def _constant(self, array: Array, hint: str) -> ir.Value:
        tensor = ir.tensor(array)
        value = ir.Value(
            name=self._fresh(hint),
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def _fresh(self, hint: str) -> str:
        name, count = hint, 0
        while name in self.names:
            count += 1
            name = f"{hint}_{count}"
        self.names.add(name)
        return name

    # -- the new graph ------------------------------------------------------------------------

    def _output(self, index: int, value: ir.Value) -> None:
        result = self._float(value)
        if result is value:
            return
        name = name_of(value)
        value.name, result.name = self._fresh(f"{name}/unread"), name
        self.graph.outputs[index] = result

    def _replace_nodes(self) -> None:
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


def _per_tensor(node: ir.Node) -> bool:
    scale = constant(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    return (
        scale is not None
        and scale.size == 1
        and scale.dtype == np.float32
        and constant(zero) is not None
        and node.outputs[0].dtype in read.LOWEST
    )


def _ordered(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The term that is not mere codes first. Two addends commute in float32; more do not."""
    if len(terms) == 2 and terms[0].kind == "codes":
        return terms[1], terms[0]
    return terms


def _check_accumulator(term: Term, names: tuple[str, ...]) -> None:
    """Refuse a product whose int32 accumulator could overflow."""
    if term.weights is None:
        return
    axis = term.weights.axis
    codes = np.abs(term.weights.codes.astype(np.float64))
    total = (
        codes.sum()
        if codes.ndim < 2
        else np.moveaxis(codes, axis, 0).reshape(codes.shape[axis], -1).sum(1).max()
    )
    bias = 0 if term.bias is None else np.abs(term.bias.astype(np.float64)).max()
    if total * 255 + bias >= 2**31:
        raise Unsupported(
            "the int32 accumulator could overflow",
            where=names[0] if names else None,
            fix="keep this operator in float with an override",
        )


__all__ += ["ZERO", "Codes", "Integer", "Weights"]
