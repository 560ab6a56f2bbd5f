"""The walk over a Q/DQ graph that decides, node by node, what becomes an integer node."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.lowering.integers import read
from edgepipe.lowering.integers.rounding import ordered, representable, round_to, shift
from edgepipe.lowering.integers.terms import ZERO, Codes, Sum, Term, Weights
from edgepipe.lowering.integers.writer import Writer
from edgepipe.quantization.graph import Array, constant, is_op, name_of
from edgepipe.quantization.placement import AVERAGES, BINARY

STAGE = "lowering.integers"


class Folder:
    """Holds what every value stands for: a ``Sum``, ``Weights``, or a float (in neither)."""

    def __init__(self, graph: ir.Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        signed = context.target.integer.activations == "int8"
        self.writer = Writer(graph, ir.DataType.INT8 if signed else ir.DataType.UINT8)
        self.sums: dict[ir.Value, Sum] = {}
        self.weights: dict[ir.Value, Weights] = {}
        self.codes: dict[ir.Value, Codes] = {}  # by the output of the QuantizeLinear
        self.floats: dict[ir.Value, ir.Value] = {}
        self.fallbacks: list[ir.Node] = []

    def run(self) -> None:
        """Rewrite the graph. Raises UserError where a quantized operator would be float."""
        for node in list(self.graph):
            self._node(node)
        for index, value in enumerate(self.graph.outputs):
            self._output(index, value)
        self._refuse_fallbacks()
        self.writer.replace_nodes()

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
        self.writer.nodes.append(node)

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
            self.writer.nodes.append(node)  # for float readers; dropped when there are none
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
        if source.dtype == self.writer.type:
            return outside
        total = Sum((Term("codes", (outside,), scale),))
        return round_to(self.writer, total, scale, zero, source, None)

    def _quantize(self, node: ir.Node) -> None:
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None and output.dtype is not None
        scale, zero = constant(node.inputs[1]), constant(node.inputs[2])
        assert scale is not None and zero is not None
        scale, offset = scale.reshape(()), int(zero.reshape(()))
        total = self.sums.get(source)
        if total is not None and total.codes is not None:
            there = total.codes
            if there.same_grid(scale, offset + shift(self.writer, output.dtype)):
                self.codes[output] = there  # rounding to the grid it is on
                self._foreign(output, there, offset)
                return
        if total is None or not representable(total):
            self.codes[output] = self._quantize_float(node, source, scale, offset)
        else:
            self.codes[output] = round_to(self.writer, total, scale, offset, output, node.name)
        self._foreign(output, self.codes[output], offset)

    def _foreign(self, output: ir.Value, codes: Codes, zero: int) -> None:
        """Serve readers of codes that are no DequantizeLinear: they see the original type."""
        readers = [use for use in output.uses() if not is_op(use.node, "DequantizeLinear")]
        if not readers and not output.is_graph_output():
            return
        plain = codes.value
        if codes.value.dtype != output.dtype or output.is_graph_output():
            assert output.dtype is not None
            term = Term("codes", (codes,), codes.scale)
            plain = self.writer.emit(
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
            fill = np.asarray(codes[0].zero, self.writer.type.numpy())
            node.replace_input_with(2, self.writer.constant(fill, "fill"))
        for value in node.outputs:
            value.type = ir.TensorType(self.writer.type)
            value.meta[ZERO] = codes[0].zero
            moved = Codes(value, codes[0].scale, codes[0].zero)
            self.sums[value] = Sum((Term("codes", (moved,), moved.scale),))
        self.writer.nodes.append(node)

    def _quantize_float(self, node: ir.Node, source: ir.Value, scale: Array, zero: int) -> Codes:
        output = node.outputs[0]
        assert output.dtype is not None
        moved = zero + shift(self.writer, output.dtype)
        value = self.writer.value(output, self.writer.type)
        value.meta[ZERO] = moved
        codes = Codes(value, scale, moved)
        name = node.name or "QuantizeLinear"
        self.writer.linear("QuantizeLinear", self._float(source), codes, value, name)
        return codes

    def _float(self, value: ir.Value) -> ir.Value:
        """``value`` in float, for those who compute in float."""
        if value in self.floats:
            return self.floats[value]
        total = self.sums.get(value)
        if total is None:
            return value
        codes = total.codes
        if codes is not None:
            result = self.writer.value(value, ir.DataType.FLOAT)
            name = f"{name_of(value)}/float"
            self.writer.linear("DequantizeLinear", codes.value, codes, result, name)
        elif representable(total) and total.terms[0].kind != "table":
            terms = ordered(total.terms)
            scales = tuple(t.scale for t in terms)
            whole = Sum(terms, names=total.names)
            limits = (total.low, total.high)
            result = self.writer.emit(whole, scales, limits, None, value, ir.DataType.FLOAT)
        else:
            result = self._recomputed(value)
        self.floats[value] = result
        return result

    def _recomputed(self, value: ir.Value) -> ir.Value:
        """The operator itself in float: what its readers need has no single accumulator."""
        node = value.producer()
        assert node is not None
        self.context.note(STAGE, node.name, f"{node.op_type} computes in float for some readers")
        result = self.writer.value(value, ir.DataType.FLOAT)
        inputs = [None if v is None else self._float(v) for v in node.inputs]
        copied = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(), outputs=[result],
            name=node.name,
        )  # fmt: skip
        self.writer.nodes.append(copied)
        return result

    def _output(self, index: int, value: ir.Value) -> None:
        result = self._float(value)
        if result is value:
            return
        name = name_of(value)
        value.name, result.name = self.writer.fresh(f"{name}/unread"), name
        self.graph.outputs[index] = result


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
