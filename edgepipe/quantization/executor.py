"""Runs parts of a network, float or rounded, sample by sample or in batches, by ONNX Runtime.

A *front* holds the values between what has run and what has not, for a number of samples: float
values as float32, quantized ones as their codes (a quarter of the memory, nothing lost).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgepipe.onnx_session import known_opset
from edgepipe.quantization.graph import Array, constant, dims, name_of, outer_values
from edgepipe.quantization.observers import Grid
from edgepipe.quantization.placement import TABLES, Placement, Unit
from edgepipe.quantization.weights import LayerWeights

#: Operators that do not care how many samples the leading dimension holds.
BATCHABLE = TABLES | frozenset(
    [
        "Conv",
        "ConvTranspose",
        "Gemm",
        "Add",
        "Sub",
        "Mul",
        "AveragePool",
        "MaxPool",
        "GlobalAveragePool",
    ]
)
BATCH_BYTES = 16 << 20
IR_VERSION = 11

Values = dict[ir.Value, Array]


@dataclass
class Rounding:
    """What makes the float graph the quantized one: grids by group, weights by node."""

    placement: Placement
    grids: dict[int, Grid]
    weights: dict[ir.Node, LayerWeights] = field(default_factory=dict)

    def grid(self, value: ir.Value) -> Grid:
        """The grid of a quantized tensor."""
        return self.grids[self.placement.group[value]]

    def holds_codes(self, value: ir.Value) -> bool:
        """Whether every reader of ``value`` sees it rounded, so that codes say all."""
        return value in self.placement.group and value.producer() in self.placement.integer


def code_dtype(grid: Grid) -> np.dtype[Any]:
    """The byte type that holds the codes in memory."""
    return np.dtype(np.int8 if grid.low < 0 else np.uint8)


@dataclass
class Program:
    """A compiled part: ``inputs`` and ``outputs`` are values of the graph."""

    session: Any
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    batched: bool

    def run(self, values: Values) -> Values:
        """Arrays [samples, *shape] in, the same out."""
        if not self.outputs:  # ONNX Runtime refuses to run for nothing
            return {}
        count = len(values[self.inputs[0]]) if self.inputs else 1
        found: list[Array] = []
        for start, stop in self._ranges(values, count):
            chunk = self._chunk(values, start, stop)
            if not found:
                found = [np.empty((count, *array.shape[1:]), array.dtype) for array in chunk]
            for whole, part in zip(found, chunk, strict=True):
                whole[start:stop] = part
        return dict(zip(self.outputs, found, strict=True))

    def _ranges(self, values: Values, count: int) -> list[tuple[int, int]]:
        step = 1
        if self.batched:
            each = sum(values[v][0].size * 4 for v in self.inputs)
            each += sum(int(np.prod(dims(v) or (1,))) * 4 for v in self.outputs)
            step = max(1, BATCH_BYTES // max(each, 1))
        return [(i, min(i + step, count)) for i in range(0, count, step)]

    def _chunk(self, values: Values, start: int, stop: int) -> list[Array]:
        feeds = {}
        for index, value in enumerate(self.inputs):
            array = values[value][start:stop]
            feeds[f"input_{index}"] = (
                array.reshape(-1, *array.shape[2:]) if self.batched else np.asarray(array[0])
            )
        found = self.session.run(None, feeds)
        if self.batched:
            return [array[:, None] for array in found]
        return [np.asarray(array)[None] for array in found]


def compile_part(
    units: Sequence[Unit], outputs: Sequence[ir.Value], rounding: Rounding | None
) -> Program:
    """A program for ``units`` in order; its inputs are what they read and do not compute.

    With ``rounding``, tensors are rounded and weights replaced as it says; values that
    ``holds_codes`` go in and out as codes.
    """
    import onnxruntime

    writer = _Writer([node for unit in units for node in unit.nodes], list(outputs), rounding)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # Otherwise ONNX Runtime rounds the float weight of a convolution between DQ and Q to int8,
    # per tensor, and computes something else than the model says.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        writer.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Program(session, writer.inputs, list(outputs), writer.batched)


class _Writer:
    """Writes part of a graph as an ONNX model whose inputs and outputs are numbered."""

    def __init__(
        self, nodes: list[ir.Node], outputs: list[ir.Value], rounding: Rounding | None
    ) -> None:
        self.rounding = rounding
        self.outputs = outputs
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, onnx.TensorProto] = {}
        produced = {value for node in nodes for value in node.outputs}
        reads = [value for node in nodes for value in outer_values(node)]
        self.inputs = list(
            dict.fromkeys(v for v in reads if v not in produced and v.const_value is None)
        )
        self.batched = _batchable(nodes, [*self.inputs, *outputs])
        for index, value in enumerate(self.inputs):
            self._enter(value, f"input_{index}")
        for node in nodes:
            self._node(node)
        for index, value in enumerate(outputs):
            codes = rounding is not None and rounding.holds_codes(value)
            source = f"{name_of(value)}/codes" if codes else name_of(value)
            self._op("Identity", [source], f"output_{index}")

    def _op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        self.nodes.append(onnx.helper.make_node(kind, inputs, [output], **attributes))

    def _constant(self, name: str, array: Array) -> str:
        # ascontiguousarray alone makes a vector of a scalar, and Gather's output another rank.
        whole = np.ascontiguousarray(array).reshape(array.shape)
        self.tensors[name] = onnx.numpy_helper.from_array(whole, name)
        return name

    def _enter(self, value: ir.Value, feed: str) -> None:
        name = name_of(value)
        if self.rounding is not None and self.rounding.holds_codes(value):
            self._op("Identity", [feed], f"{name}/codes")
            self._dequantize(value)
            return
        self._op("Identity", [feed], name)
        self._quantize(value)

    def _quantize(self, value: ir.Value) -> None:
        if self.rounding is None or value not in self.rounding.placement.group:
            return
        grid, name = self.rounding.grid(value), name_of(value)
        clipped = f"{name}/clipped"
        ends = [(bound - grid.zero_point) * grid.scale for bound in (grid.low, grid.high)]
        low, high = (
            self._constant(f"{name}/{end}", np.asarray(bound, np.float32))
            for end, bound in zip(("low", "high"), ends, strict=True)
        )
        self._op("Clip", [name, low, high], clipped)
        self._op("QuantizeLinear", [clipped, *self._scale(value)], f"{name}/codes")
        self._dequantize(value)

    def _dequantize(self, value: ir.Value) -> None:
        name = name_of(value)
        self._op("DequantizeLinear", [f"{name}/codes", *self._scale(value)], f"{name}/rounded")

    def _scale(self, value: ir.Value) -> list[str]:
        assert self.rounding is not None
        grid, name = self.rounding.grid(value), name_of(value)
        zero = np.asarray(grid.zero_point, code_dtype(grid))
        return [
            self._constant(f"{name}/scale", np.asarray(grid.scale)),
            self._constant(f"{name}/zero", zero),
        ]

    def _node(self, node: ir.Node) -> None:
        proto = ir.serde.serialize_node(node)
        weights = self.rounding.weights.get(node) if self.rounding is not None else None
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value.const_value is not None:
                self._held(value)
            elif self.rounding is not None and self.rounding.placement.reads_codes(node, value):
                proto.input[index] = f"{name_of(value)}/rounded"
        for value in outer_values(node):
            if value.const_value is not None:
                self._held(value)
        if weights is not None:
            stem = name_of(node.outputs[0])
            proto.input[1] = self._constant(f"{stem}/weight", weights.float_weight())
            bias = self._constant(f"{stem}/bias", weights.float_bias())
            if node.op_type == "MatMul":
                proto.output[0] = f"{stem}/product"
            elif len(proto.input) > 2:
                proto.input[2] = bias
            else:
                proto.input.append(bias)
        self.nodes.append(proto)
        if weights is not None and node.op_type == "MatMul":
            self._op("Add", [f"{stem}/product", bias], stem)
        for value in node.outputs:
            if value.name:
                self._quantize(value)

    def _held(self, value: ir.Value) -> None:
        name = name_of(value)
        if name not in self.tensors:
            array = constant(value)
            assert array is not None
            self._constant(name, array)

    def _info(self, name: str, value: ir.Value) -> onnx.ValueInfoProto:
        shape: list[int | str] | None = list(dims(value) or ()) if dims(value) is not None else None
        if shape is not None and self.batched:
            shape[0] = "samples"
        dtype = int(value.dtype or ir.DataType.FLOAT)
        if self.rounding is not None and self.rounding.holds_codes(value):
            dtype = onnx.helper.np_dtype_to_tensor_dtype(code_dtype(self.rounding.grid(value)))
        return onnx.helper.make_tensor_value_info(name, dtype, shape)

    def model(self) -> onnx.ModelProto:
        """The finished model."""
        graph = onnx.helper.make_graph(
            self.nodes,
            "part",
            [self._info(f"input_{i}", v) for i, v in enumerate(self.inputs)],
            [self._info(f"output_{i}", v) for i, v in enumerate(self.outputs)],
            list(self.tensors.values()),
        )
        opset = onnx.helper.make_opsetid("", known_opset(n.op_type for n in self.nodes))
        return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)


def _batchable(nodes: Iterable[ir.Node], ends: Iterable[ir.Value]) -> bool:
    leading: Callable[[ir.Value], bool] = lambda v: (dims(v) or (0,))[0] == 1  # noqa: E731
    return all(leading(v) for v in ends) and all(
        node.domain == ""
        and node.op_type in BATCHABLE
        and (node.op_type not in ("Add", "Sub", "Mul") or _same_rank(node))
        for node in nodes
    )


def _same_rank(node: ir.Node) -> bool:
    shapes = [dims(v) for v in node.inputs if v is not None]
    ranks = {len(s) for s in shapes if s is not None}
    return None not in shapes and len(ranks) == 1 and all(s and s[0] == 1 for s in shapes)
