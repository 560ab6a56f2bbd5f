"""Cross-layer equalisation for per-tensor activations (after Nagel et al. 2019, arXiv 1906.04721).

Scaling channel i of a tensor by 1/s and the weights that read it by s changes nothing in float,
but every channel then uses more of the tensor's one grid. Weights of the producer have a scale
per output channel, so they do not care: what is balanced is the range of the channel against the
weights that read it.

Channels are followed one by one, not tensor by tensor: an Add ties the channels of its operands,
Concat, Slice and Pad shift them. A class of tied channels may be scaled when
1. every tensor it appears in is written by a linear operator or by one that commutes with
   positive factors (Relu, LeakyRelu, Add, averages, MaxPool, Concat, Slice, Pad with zero, …),
2. everything that reads it is one of those or a linear operator,
3. it is neither input nor output of the graph, and no Clip with another bound than 0 sees it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.executor import Values, compile_part
from edgepipe.quantization.graph import Array, constant, dims, is_op, name_of
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.placement import Unit, weight_of
from edgepipe.quantization.remarks import Note

#: Exponent of the activations' share in the balance, the weights have the rest. By bits of weights
#: and activations: 8-bit weights and 4-bit activations can spare it all (an 8-layer ResNet, w4a4:
#: 17.5 dB without, 17.6 at half, 17.8 at 1; a 20-layer one, w8a8: 31.8, and 32.1 at 1).
BALANCE = {(8, 8): 1.0, (8, 4): 1.0, (4, 4): 1.0}
EVEN = 0.5
#: Largest factor either way: further out one side only underflows.
LIMIT = 32.0
#: Samples that channel ranges are taken from.
SAMPLES = 128
_SAME = frozenset(
    ["Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Resize"]
)


class _Classes:
    """Union-find over (tensor, channel)."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.of: dict[ir.Value, Array] = {}
        self.fixed: set[int] = set()

    def channels(self, value: ir.Value) -> Array | None:
        """Class numbers [C] of a tensor [1, C, …] (or [1, C]), made at first sight."""
        if value not in self.of:
            shape = dims(value)
            if shape is None or len(shape) < 2:
                return None
            start = len(self.parent)
            self.parent.extend(range(start, start + shape[1]))
            self.of[value] = np.arange(start, start + shape[1])
        return self.of[value]

    def root(self, index: int) -> int:
        """The number that stands for a class."""
        while self.parent[index] != index:
            self.parent[index] = self.parent[self.parent[index]]
            index = self.parent[index]
        return index

    def tie(self, first: Array, second: Array) -> None:
        """These channels must have the same factor, element by element."""
        for a, b in zip(first, second, strict=True):
            self.parent[self.root(int(a))] = self.root(int(b))

    def fix(self, value: ir.Value) -> None:
        """This tensor must stay as it is."""
        channels = self.channels(value)
        if channels is not None:
            self.fixed.update(int(c) for c in channels)


@dataclass(frozen=True)
class Equalization:
    """Factors [C] of the channels of each tensor that is scaled (divided by them)."""

    factors: dict[ir.Value, Array]

    def apply(self, graph: ir.Graph) -> None:
        """Scale the weights and biases of ``graph`` in new initializers."""
        for node in graph:
            if weight_of(node) is not None:
                self._scale(graph, node)

    def _scale(self, graph: ir.Graph, node: ir.Node) -> None:
        source = node.inputs[0]
        assert source is not None
        read, written = self.factors.get(source), self.factors.get(node.outputs[0])
        layer = Layer.of(node)
        if read is not None:
            _replace(graph, node, 1, _times_inputs(layer, layer.weight, read))
        if written is not None:
            layer = Layer.of(node)
            divisor = _by_outputs(layer, written).astype(np.float32)
            _replace(graph, node, 1, layer.weight / divisor)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                _replace(graph, node, 2, layer.bias / written.astype(np.float32))


def _by_outputs(layer: Layer, written: Array) -> Array:
    """Factors of output channels in a shape that broadcasts over the weight."""
    shape, groups = layer.weight.shape, layer.groups
    if layer.node.op_type == "ConvTranspose":  # [ci, co / groups, …]: a group's inputs side by side
        rows = np.repeat(written.reshape(groups, -1), shape[0] // groups, 0)
        return rows.reshape(*shape[:2], *[1] * (len(shape) - 2))
    return written.reshape([-1 if a == layer.axis else 1 for a in range(len(shape))])


def plan(
    graph: ir.Graph, ranges: Mapping[ir.Value, Array], note: Note, balance: float = EVEN
) -> Equalization:
    """Choose factors. ``ranges``: largest magnitude of each channel [C] of observed tensors."""
    classes = _Classes()
    for value in [*graph.inputs, *graph.outputs]:
        classes.fix(value)
    for node in graph:
        _visit(node, classes)
    fixed = {classes.root(c) for c in classes.fixed}
    count = len(classes.parent)
    activation, weight = np.zeros(count), np.zeros(count)
    for value, channels in classes.of.items():
        if value in ranges:
            roots = np.array([classes.root(int(c)) for c in channels], dtype=int)
            share = ranges[value] / max(float(ranges[value].max()), 1e-30)
            np.maximum.at(activation, roots, share)
    for node in graph:
        if weight_of(node) is not None and node.inputs[0] in classes.of:
            shares, channels = _input_weights(Layer.of(node)), classes.of[node.inputs[0]]
            # Otherwise the reduction is over another axis than 1, and the tensor is fixed.
            if len(shares) == len(channels):
                roots = np.array([classes.root(int(c)) for c in channels], dtype=int)
                np.maximum.at(weight, roots, shares)
    factors = np.ones(count)
    free = np.array([i not in fixed for i in range(count)], dtype=bool)
    usable = free & (activation > 0) & (weight > 0)
    factors[usable] = activation[usable] ** balance / weight[usable] ** (1 - balance)
    chosen: dict[ir.Value, Array] = {}
    for value, channels in classes.of.items():
        roots = np.array([classes.root(int(c)) for c in channels], dtype=int)
        if usable[roots].any():
            chosen[value] = np.clip(factors[roots], 1 / LIMIT, LIMIT)
    if chosen:
        note(None, f"{len(chosen)} tensors equalised")
    return Equalization(chosen)


def _visit(node: ir.Node, classes: _Classes) -> None:
    """Tie or fix the channels around one node."""
    inputs = [v for v in node.inputs if v is not None and v.const_value is None]
    outputs = list(node.outputs)
    if weight_of(node) is not None and len(dims(inputs[0]) or ()) >= 2:
        if node.op_type == "MatMul" and len(dims(inputs[0]) or ()) != 2:
            _fix_all(classes, [*inputs, *outputs])
        for value in [inputs[0], outputs[0]]:
            classes.channels(value)
        return
    if _tie(node, inputs, classes):
        return
    _fix_all(classes, [*inputs, *outputs])


def _fix_all(classes: _Classes, values: list[ir.Value]) -> None:
    for value in values:
        classes.fix(value)


def _tie(node: ir.Node, inputs: list[ir.Value], classes: _Classes) -> bool:
    """Tie channels through a node that commutes with positive factors; False if it does not."""
    output = classes.channels(node.outputs[0]) if node.outputs[0].shape is not None else None
    sources = [classes.channels(value) for value in inputs]
    if output is None or any(s is None for s in sources) or not sources or node.domain != "":
        return False
    shapes = [dims(value) for value in [*inputs, *node.outputs]]
    first = sources[0]
    assert first is not None
    if node.op_type in _SAME and len(node.outputs) == 1 and len(first) == len(output):
        classes.tie(first, output)
        return True
    if is_op(node, "Add") and len(inputs) == 2 and len(set(shapes)) == 1:
        for source in sources:
            assert source is not None
            classes.tie(source, output)
        return True
    if is_op(node, "Reshape", "Flatten", "Squeeze") and shapes[-1] is not None:
        kept = shapes[0] is not None and np.prod(shapes[0]) == len(first) == len(output)
        if kept:
            classes.tie(first, output)
        return kept
    if is_op(node, "Concat") and node.attributes.get_int("axis", 0) == 1:
        joined = np.concatenate([s for s in sources if s is not None])
        if len(joined) < len(output):  # a part is constant
            return False
        classes.tie(joined, output)
        return True
    if is_op(node, "Pad") or is_op(node, "Slice"):
        moved = _moved(node, len(first))
        if moved is not None:
            inside = moved >= 0
            classes.tie(first[moved[inside]], output[inside])
            return True
    return False


def _moved(node: ir.Node, channels: int) -> Array | None:
    """For each output channel of a zero Pad or a Slice, the input channel or −1."""
    arrays = [constant(v) for v in node.inputs[1:]]
    index = np.arange(channels)
    if is_op(node, "Pad"):
        fill = arrays[1] if len(arrays) > 1 else None
        zero = fill is None or float(fill.reshape(())) == 0.0
        if node.attributes.get_string("mode", "constant") != "constant" or not zero:
            return None
        if arrays[0] is None or len(node.inputs) > 3:
            return None
        rank = len(arrays[0]) // 2
        before, after = int(arrays[0][1]), int(arrays[0][1 + rank])
        if min(before, after) < 0:
            return None
        return np.pad(index, (before, after), constant_values=-1)
    if len(arrays) < 3 or any(a is None for a in arrays):
        return None
    starts, ends, axes = arrays[0], arrays[1], arrays[2]
    assert starts is not None and ends is not None and axes is not None
    steps = arrays[3] if len(arrays) > 3 and arrays[3] is not None else np.ones(len(axes), int)
    rank = len(dims(node.outputs[0]) or ())
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if int(axis) in (1, 1 - rank):
            if int(step) < 0:
                return None
            index = index[slice(int(start), int(end), int(step))]
    return index


def _input_weights(layer: Layer) -> Array:
    """Per input channel, the largest share of an output channel's largest weight [C]."""
    weight = np.abs(layer.weight)
    axis = layer.axis
    other = tuple(i for i in range(weight.ndim) if i != axis)
    share = weight / np.maximum(weight.max(other, keepdims=True), 1e-30)
    if layer.node.op_type in ("Gemm", "MatMul"):
        dense: Array = share.max(axis)
        return dense
    if layer.node.op_type == "ConvTranspose":
        scattered: Array = share.reshape(share.shape[0], -1).max(1)
        return scattered
    per_group = share.reshape(layer.groups, -1, *share.shape[1:]).max(1)
    result: Array = per_group.reshape(layer.groups * share.shape[1], -1).max(1)
    return result


def _times_inputs(layer: Layer, weight: Array, factor: Array) -> Array:
    """Multiply the weights that read input channel i by ``factor[i]``."""
    factor = factor.astype(np.float32)
    if layer.node.op_type in ("Gemm", "MatMul"):
        return weight * (factor[:, None] if layer.transposed else factor[None])
    tail = (1,) * (weight.ndim - 2)
    if layer.node.op_type == "ConvTranspose":
        return weight * factor.reshape(-1, 1, *tail)
    split = weight.reshape(layer.groups, -1, *weight.shape[1:])
    return (split * factor.reshape(layer.groups, 1, -1, *tail)).reshape(weight.shape)


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: Array) -> None:
    old = node.inputs[index]
    assert old is not None
    stem, count = f"{name_of(old)}/equalised", 0
    while f"{stem}_{count}" in graph.initializers:
        count += 1
    name = f"{stem}_{count}"
    tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    node.replace_input_with(index, value)
    if not old.uses():
        graph.initializers.pop(name_of(old), None)


def equalize(graph: ir.Graph, inputs: Values, bits: tuple[int, int | None], note: Note) -> None:
    """Observe channel ranges on up to ``SAMPLES`` samples, choose factors and apply them.

    ``bits``: of weights and activations (None: float).
    """
    balance = EVEN if bits[1] is None else BALANCE.get((bits[0], bits[1]), EVEN)
    plan(graph, channel_ranges(graph, inputs), note, balance).apply(graph)


def channel_ranges(graph: ir.Graph, inputs: Values) -> dict[ir.Value, Array]:
    """Largest magnitude of each channel in all samples, of what linear operators touch."""
    touched = [
        value
        for node in graph
        if weight_of(node) is not None
        for value in (node.inputs[0], node.outputs[0])
        if value is not None and value.producer() is not None and len(dims(value) or ()) >= 2
    ]
    watched = list(dict.fromkeys(touched))
    if not watched:
        return {}
    program = compile_part([Unit((node,), False) for node in graph], watched, None)
    peaks = {value: np.zeros((dims(value) or (0, 0))[1]) for value in watched}
    count = min(SAMPLES, len(next(iter(inputs.values()))))
    for index in range(count):
        found = program.run({v: a[index : index + 1] for v, a in inputs.items()})
        for value, array in found.items():
            magnitudes = np.abs(array[0]).max(tuple(i for i in range(array[0].ndim) if i != 1))
            np.maximum(peaks[value], magnitudes, out=peaks[value])
    return peaks
