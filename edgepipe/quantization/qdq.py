"""Writes Q/DQ pairs and integer weights into the graph: standard ONNX, opset 21 or later.

1. A quantized tensor x becomes x → QuantizeLinear → DequantizeLinear; integer readers take the
   last, and so does everyone where the producer is integer. A quantized graph output keeps its
   name.
2. A weight becomes an INT8 or INT4 initializer → DequantizeLinear along its output channels (or
   blocks of input channels), a bias an INT32 one with scale input scale × weight scale.
3. Activations of 4 bits are bytes too, cut to the 16 codes by a Clip in front: runtimes that
   know UINT4 at all refuse it in pooling and movement.
4. A Relu or Clip whose bounds the grid behind it implies is removed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.onnx_session import OPSET
from edgepipe.quantization.edit import Names, initializer
from edgepipe.quantization.executor import Rounding
from edgepipe.quantization.graph import Array, bounds, name_of
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.observers import Grid
from edgepipe.quantization.weights import LayerWeights


def code_type(bits: int, signed: bool) -> ir.DataType:
    """The ONNX type of codes."""
    if bits == 4:
        return ir.DataType.INT4 if signed else ir.DataType.UINT4
    return ir.DataType.INT8 if signed else ir.DataType.UINT8


def grid_type(grid: Grid) -> ir.DataType:
    """The ONNX type of a tensor with this grid: bytes, whatever the bits."""
    return code_type(8, grid.low < 0)


class QdqWriter:
    """Edits one graph. ``write`` does all of it."""

    def __init__(self, graph: ir.Graph, rounding: Rounding) -> None:
        self.graph, self.rounding = graph, rounding
        self.names = Names(graph)
        self._parameters: dict[int, tuple[ir.Value, ir.Value]] = {}

    def write(self) -> None:
        """Insert everything. Nodes keep their order; unused float weights are dropped."""
        old = {
            value
            for node in self.rounding.weights
            for value in node.inputs[1:]
            if value is not None
        }
        for node, weights in self.rounding.weights.items():
            self._weights(node, weights)
        for value in list(self.rounding.placement.group):
            self._activation(value)
        self._drop_implied_bounds()
        self._plain_pools()
        for value in old:
            if not value.uses() and value.name and not value.is_graph_output():
                self.graph.initializers.pop(value.name, None)

    def _cut(self, value: ir.Value, grid: Grid) -> tuple[list[ir.Node], ir.Value]:
        """The Clip that keeps bytes to a narrower grid, and its output."""
        if grid.high - grid.low == 255:
            return [], value
        ends = [
            self._initializer(
                np.asarray((end - grid.zero_point) * grid.scale, np.float32), f"{value.name}/end"
            )
            for end in (grid.low, grid.high)
        ]
        clip = self._node("Clip", [value, *ends], value, ir.DataType.FLOAT, f"{value.name}/cut")
        return [clip], clip.outputs[0]

    def _drop_implied_bounds(self) -> None:
        """Remove a Relu or Clip that cuts off nothing the grid behind it does not cut off.

        Exact: the bounds' own codes lie at or beyond the ends of the grid.
        """
        placement = self.rounding.placement
        for node in list(self.graph):
            limits, value = bounds(node), node.outputs[0]
            if limits is None or not self.rounding.holds_codes(value):
                continue
            source, grid = node.inputs[0], self.rounding.grid(value)
            assert source is not None
            low, high = (np.rint(np.float32(b) / grid.scale) + grid.zero_point for b in limits)
            if low > grid.low or high < grid.high or value.is_graph_output():
                continue
            fused = source.producer() in placement.integer and source not in placement.group
            if fused and len(tuple(source.uses())) == 1:
                for use in tuple(value.uses()):
                    use.node.replace_input_with(use.idx, source)
                self.graph.remove(node, safe=True)

    def _plain_pools(self) -> None:
        """Leave out dilations of 1: ONNX Runtime's own quantized pool does not know them."""
        for node in self.graph:
            if node.op_type == "AveragePool" and set(
                node.attributes.get_ints("dilations", (1,))
            ) == {1}:
                node.attributes.pop("dilations", None)

    def _initializer(self, array: Array, hint: str, dtype: ir.DataType | None = None) -> ir.Value:
        return initializer(self.graph, array, self.names.fresh(hint), dtype)

    def _node(
        self, op_type: str, inputs: list[ir.Value], like: ir.Value, dtype: ir.DataType,
        hint: str, **attributes: Any,
    ) -> ir.Node:  # fmt: skip
        node = ir.node(op_type, inputs, attributes, version=OPSET)
        output = node.outputs[0]
        output.name = self.names.fresh(hint)
        node.name = self.names.fresh(f"{output.name}/{op_type}")
        output.shape, output.type = like.shape, ir.TensorType(dtype)
        return node

    def _weights(self, node: ir.Node, weights: LayerWeights) -> None:
        weight = node.inputs[1]
        assert weight is not None
        stem = name_of(weight)
        codes = self._initializer(weights.codes, f"{stem}/codes", code_type(weights.bits, True))
        scale = self._initializer(weights.scale, f"{stem}/scale")
        attributes: dict[str, Any] = {"axis": weights.axis}
        if weights.group_size is not None:
            attributes["block_size"] = weights.group_size
        float_type = ir.DataType.FLOAT
        restore = self._node(
            "DequantizeLinear", [codes, scale], codes, float_type, f"{stem}/restored", **attributes
        )
        self.graph.insert_before(node, restore)
        node.replace_input_with(1, restore.outputs[0])
        if weights.bias_codes is None:
            self._float_bias(node, weights)
            return
        bias = self._initializer(weights.bias_codes, f"{stem}/bias_codes")
        bias_scale = self._initializer(
            np.asarray(weights.bias_scale, np.float32), f"{stem}/bias_scale"
        )
        restore = self._node(
            "DequantizeLinear", [bias, bias_scale], bias, float_type, f"{stem}/bias", axis=0
        )
        self.graph.insert_before(node, restore)
        self._set_bias(node, restore.outputs[0])

    def _float_bias(self, node: ir.Node, weights: LayerWeights) -> None:
        if not np.array_equal(weights.bias, Layer.bias_of(node, len(weights.bias))):
            self._set_bias(node, self._initializer(weights.bias, f"{node.name}/bias"))

    def _set_bias(self, node: ir.Node, bias: ir.Value) -> None:
        if node.op_type == "MatMul":
            producer = bias.producer()
            if producer is not None:
                self._matmul_bias(node, bias)
            return
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, bias)

    def _matmul_bias(self, node: ir.Node, bias: ir.Value) -> None:
        """MatMul has no bias: an Add behind it carries the one that the methods found."""
        output = node.outputs[0]
        add = ir.node(
            "Add", [output, bias], version=OPSET, name=self.names.fresh(f"{node.name}/bias")
        )
        added = add.outputs[0]
        added.shape, added.type = output.shape, output.type
        name = output.name
        if output.is_graph_output():
            for index, value in enumerate(self.graph.outputs):
                if value is output:
                    self.graph.outputs[index] = added
        for use in output.uses():
            if use.node is not add:
                use.node.replace_input_with(use.idx, added)
        output.name, added.name = self.names.fresh(f"{name}/product"), name
        self.graph.insert_after(node, add)
        group = self.rounding.placement.group
        if output in group:
            group[added] = group.pop(output)
            self.rounding.placement.integer.add(add)

    def _activation(self, value: ir.Value) -> None:
        grid = self.rounding.grid(value)
        number = self.rounding.placement.group[value]
        if number not in self._parameters:
            dtype = grid_type(grid)
            self._parameters[number] = (
                self._initializer(np.asarray(grid.scale), f"{value.name}/scale"),
                self._initializer(np.asarray(grid.zero_point), f"{value.name}/zero_point", dtype),
            )
        scale, zero = self._parameters[number]
        stem = name_of(value)
        chain, cut = self._cut(value, grid)
        quantize = self._node(
            "QuantizeLinear", [cut, scale, zero], value, grid_type(grid), f"{stem}/codes"
        )
        restore = self._node(
            "DequantizeLinear", [quantize.outputs[0], scale, zero], value,
            ir.DataType.FLOAT, f"{stem}/rounded",
        )  # fmt: skip
        placement = self.rounding.placement
        for use in list(value.uses()):
            if use.node not in (quantize, *chain) and placement.reads_codes(use.node, value):
                use.node.replace_input_with(use.idx, restore.outputs[0])
        producer = value.producer()
        if producer is not None:
            self.graph.insert_after(producer, [*chain, quantize, restore])
        else:
            self.graph.insert_before(self.graph[0], [*chain, quantize, restore])
        if value.is_graph_output() and producer in placement.integer:
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = restore.outputs[0]
            value.name, restore.outputs[0].name = self.names.fresh(f"{stem}/float"), stem
