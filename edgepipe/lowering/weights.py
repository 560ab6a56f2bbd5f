"""Weights that a float graph holds as codes or halves stay so, for kernels that unpack them.

``fold`` replaces what computes a linear operator's constant weight or bias by a constant. Its
value is the float32 tensor, which is what every part of lowering sees that knows nothing of
storage; ``meta[META]`` has the stored form where a kernel reads it:

1. DequantizeLinear of integers that fit 8 bits without their zero point: one scale, one per
   output channel, or one per block of input channels.
2. Cast of float16 to float32, where every value is finite.

Every other form is computed now; the reason is noted, since it costs the size of float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.kernels.weights import FLOAT32, WeightFormat
from edgepipe.lowering.elementwise import attribute, constant

STAGE = "lowering.weights"
META = "edgepipe.weights"

_LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FOUR_BITS: tuple[ir.DataType | None, ...] = (ir.DataType.INT4, ir.DataType.UINT4)


@dataclass(frozen=True)
class StoredWeights:
    """A weight of a linear operator in ONNX layout: codes (int8) and scales, or halves.

    ``scale`` is ``[output channels]``, or has the weight's rank with one entry per group along
    its input channels.
    """

    format: WeightFormat
    array: np.ndarray
    scale: np.ndarray | None = None


def fold(model: ir.Model, context: Context) -> None:
    """Rewrite the float linear operators of ``model`` in place."""
    folder = _Folder(model.graph, context)
    for node in list(model.graph):
        if node.domain in ("", "ai.onnx") and node.op_type in _LINEAR:
            folder.visit(node)
    folder.remove_unread()


def stored(value: ir.Value | None) -> StoredWeights | None:
    """What ``fold`` found out about a weight; None for a plain one."""
    return None if value is None else value.meta.get(META)


def format_of(value: ir.Value | None) -> WeightFormat:
    """How a kernel reads this weight."""
    found = stored(value)
    return FLOAT32 if found is None else found.format


class _Folder:
    def __init__(self, graph: ir.Graph, context: Context) -> None:
        self.graph, self.context = graph, context
        self.folded: dict[tuple[ir.Value, int], ir.Value] = {}
        self.names = {v.name for n in graph.all_nodes() for v in n.outputs} | {*graph.initializers}
        self.names |= {v.name for v in graph.inputs}

    def visit(self, node: ir.Node) -> None:
        """Replace the weight and the bias of ``node`` where they are computed from constants."""
        for index in range(1, len(node.inputs)):
            value = node.inputs[index]
            source = None if value is None else value.producer()
            if value is None or source is None or not _constant_float(source):
                continue
            axis = channel_axis(node) if index == 1 else 0
            if (value, axis) not in self.folded:
                parts = _Source.of(source)
                self.folded[value, axis] = self._constant(value, parts)
                if index == 1:
                    self._keep_small(node, parts, self.folded[value, axis])
            node.replace_input_with(index, self.folded[value, axis])

    def _keep_small(self, node: ir.Node, source: _Source, weight: ir.Value) -> None:
        found = _halves(source.array) if source.scale is None else _codes(node, source)
        if isinstance(found, str):
            self.context.note(STAGE, node.name, f"its weights become float32: {found}")
        else:
            weight.meta[META] = found

    def _constant(self, value: ir.Value, source: _Source) -> ir.Value:
        name, count = f"{value.name}/constant", 0
        while name in self.names:
            name, count = f"{value.name}/constant_{count}", count + 1
        self.names.add(name)
        assert isinstance(value.shape, ir.Shape)
        tensor = ir.LazyTensor(
            partial(source.value, name), ir.DataType.FLOAT, value.shape, cache=True, name=name
        )
        type_ = ir.TensorType(ir.DataType.FLOAT)
        result = ir.Value(name=name, shape=value.shape, type=type_, const_value=tensor)
        self.graph.register_initializer(result)
        return result

    def remove_unread(self) -> None:
        """Drop the nodes whose results nobody reads any more."""
        for value in {value for value, _ in self.folded}:
            node = value.producer()
            if node is not None and not value.uses() and not value.is_graph_output():
                inputs = [v for v in node.inputs if v is not None]
                self.graph.remove(node, safe=True)
                for unread in inputs:
                    if unread.name and not unread.uses() and not unread.is_graph_output():
                        self.graph.initializers.pop(unread.name, None)


def channel_axis(node: ir.Node) -> int:
    """Axis of the output channels in the weight of a linear operator."""
    if node.op_type == "MatMul":
        return len(node.inputs[1].shape or ()) - 1  # type: ignore[union-attr]
    transposed = node.op_type == "Gemm" and not int(attribute(node, "transB", 0))
    return 1 if transposed or node.op_type == "ConvTranspose" else 0


def _constant_float(node: ir.Node) -> bool:
    """Whether ``node`` makes float32 of constants, in one of the forms known here."""
    value = node.outputs[0]
    if value.dtype != ir.DataType.FLOAT or any(v and constant(v) is None for v in node.inputs):
        return False
    if node.op_type == "Cast":
        return node.inputs[0].dtype == ir.DataType.FLOAT16  # type: ignore[union-attr]
    return node.op_type == "DequantizeLinear" and constant(node.inputs[1]).dtype == np.float32  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Source:
    """What a Cast or DequantizeLinear of constants computes, without the node.

    ``scale`` and ``zero`` have the rank of ``array``; they are None for a Cast.
    """

    array: np.ndarray
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None
    axis: int = 0
    block: int = 0
    four_bits: bool = False

    @classmethod
    def of(cls, node: ir.Node) -> _Source:
        array, *parameters = (constant(value) for value in node.inputs)
        assert array is not None
        if node.op_type == "Cast":
            return cls(array)
        axis = int(attribute(node, "axis", 1)) % max(array.ndim, 1)
        block = int(attribute(node, "block_size", 0))
        shape = [-1 if a == axis else 1 for a in range(array.ndim)]
        aligned = [
            p.reshape(shape) if p is not None and p.size > 1 and not block else p
            for p in parameters
        ]
        scale, zero = (*aligned, None)[:2]
        assert scale is not None
        if scale.size == 1 and not block:
            scale = scale.reshape((1,) * array.ndim)
        if zero is not None and not zero.any():
            zero = None
        four_bits = node.inputs[0].dtype in _FOUR_BITS  # type: ignore[union-attr]
        return cls(array, scale, zero, axis, block, four_bits)

    def _spread(self, array: np.ndarray) -> np.ndarray:
        """Values per block, one for each element along the axis."""
        if not self.block:
            return array
        repeated = np.repeat(array, self.block, self.axis)
        return repeated.take(range(self.array.shape[self.axis]), self.axis)

    def integers(self) -> np.ndarray:
        """Codes without their zero point, int32."""
        codes = self.array.astype(np.int32)
        return codes if self.zero is None else codes - self._spread(self.zero.astype(np.int32))

    def value(self, name: str) -> ir.TensorProtocol:
        """The float32 tensor."""
        if self.scale is None:
            return ir.tensor(self.array.astype(np.float32), name=name)
        return ir.tensor(self.integers().astype(np.float32) * self._spread(self.scale), name=name)


def _halves(halves: np.ndarray) -> StoredWeights | str:
    if not np.isfinite(halves).all():
        return "not all halves are finite"
    return StoredWeights(WeightFormat("float16"), halves)


def _codes(node: ir.Node, source: _Source) -> StoredWeights | str:
    """The stored form of ``node``'s weight, which ``source`` dequantises; or why there is none."""
    integers, scale, channel = source.integers(), source.scale, channel_axis(node)
    assert scale is not None
    if node.op_type == "MatMul" and np.prod(integers.shape[:-2]) != 1:
        return "several matrices"
    if not np.isfinite(scale).all():
        return "not all scales are finite"
    if not _fits(integers, 8):
        return f"codes from {integers.min()} to {integers.max()} do not fit 8 bits"
    kind = "int4" if source.four_bits and _fits(integers, 4) else "int8"
    codes = integers.astype(np.int8)
    if source.block:
        inputs = integers.ndim - 2 if node.op_type == "MatMul" else 1 - channel
        if source.axis != inputs:
            return f"blocks along axis {source.axis}, not along input channels"
        if node.op_type == "Conv" and codes.shape[1] == 1:
            return "blocks of one input channel"
        return StoredWeights(WeightFormat(kind, source.block), codes, scale)
    if scale.size != 1 and source.axis != channel:
        return f"scales along axis {source.axis}, not along output channels"
    per_channel = np.broadcast_to(scale.reshape(-1), codes.shape[channel : channel + 1])
    return StoredWeights(WeightFormat(kind), codes, per_channel)


def _fits(integers: np.ndarray, bits: int) -> bool:
    limit = 1 << (bits - 1)
    return bool(integers.min(initial=0) >= -limit and integers.max(initial=0) < limit)
