"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): outlier channels move into the weights.

Where channel j of a tensor [..., K] is divided by s_j and row j of the weights that read it is
multiplied by s_j, a dense layer computes the same, but the tensor's one grid need no longer span
channels that are a hundred times larger than others. s_j = max|x_j|^α / max|w_j|^(1-α).

1. A LayerNormalization that only dense layers read: its scale and shift are divided.
2. A dense layer (and the Add of its bias) that only dense layers read: its columns are divided.
3. A LayerNormalization that others read too (a residual behind it): a Mul in front of the dense
   layers divides, and is computed in float as the normalisation is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.executor import Values, compile_part
from edgepipe.quantization.graph import Array, constant, dims, is_op, name_of, only_user
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.placement import Unit, weight_of
from edgepipe.quantization.remarks import Note

#: α: how much of the difficulty moves from activations to weights.
STRENGTH = 0.5
#: Largest factor either way: further out one side only underflows.
LIMIT = 64.0
#: Samples that channel ranges are taken from.
SAMPLES = 128


@dataclass(frozen=True)
class _Migration:
    """``value`` [..., K] is divided, in ``sources`` or by a Mul; ``readers`` are multiplied.

    ``sources``: (node, input index) of constants with K as their last axis.
    """

    value: ir.Value
    readers: tuple[ir.Node, ...]
    sources: tuple[tuple[ir.Node, int], ...]


def smooth(graph: ir.Graph, inputs: Values, note: Note) -> None:
    """Migrate wherever one of the cases applies, from ranges of up to ``SAMPLES`` samples."""
    migrations = [m for value in _values(graph) if (m := _migration(value)) is not None]
    peaks = _peaks(graph, [m.value for m in migrations], inputs)
    editor = _Editor(graph)
    for migration in migrations:
        factor = _factor(peaks[migration.value], migration.readers)
        for node, index in migration.sources:
            editor.replace(node, index, (_array(node, index) / factor).astype(np.float32))
        if not migration.sources:
            editor.divide(migration.value, migration.readers, factor)
        for node in migration.readers:
            layer = Layer.of(node)
            rows = factor[:, None] if layer.transposed else factor[None]
            editor.replace(node, 1, (layer.weight * rows).astype(np.float32))
    note(None, f"{len(migrations)} tensors smoothed into the weights that read them")


def _values(graph: ir.Graph) -> list[ir.Value]:
    """Inputs of dense layers, once each."""
    nodes = [n for n in graph if is_op(n, "MatMul", "Gemm") and weight_of(n) is not None]
    return list(dict.fromkeys(v for n in nodes if (v := n.inputs[0]) is not None))


def _migration(value: ir.Value) -> _Migration | None:
    """How to divide the channels of ``value``, or None."""
    users = [use.node for use in value.uses()]
    readers = tuple(n for n in dict.fromkeys(users) if _dense(n, value))
    shared = len(readers) < len(set(users)) or value.is_graph_output()
    producer = value.producer()
    if is_op(producer, "LayerNormalization") and producer is not None:
        if any(_array_or_none(producer, i) is None for i in _parameters(producer)):
            return None
        if _array(producer, 1).shape != ((dims(value) or (0,))[-1],):
            return None
        sources = tuple((producer, index) for index in _parameters(producer))
        return _Migration(value, readers, () if shared else sources)
    found = None if shared else _columns(producer)
    return None if found is None else _Migration(value, readers, found)


def _dense(node: ir.Node, value: ir.Value) -> bool:
    return is_op(node, "MatMul", "Gemm") and weight_of(node) is not None and node.inputs[0] is value


def _parameters(norm: ir.Node) -> list[int]:
    """Indices of the scale and, if there is one, the shift."""
    return [i for i in (1, 2) if len(norm.inputs) > i and norm.inputs[i] is not None]


def _columns(producer: ir.Node | None) -> tuple[tuple[ir.Node, int], ...] | None:
    """The constants that carry the output channels of a dense layer, or None."""
    found: list[tuple[ir.Node, int]] = []
    if is_op(producer, "Add") and producer is not None:
        index = next((i for i in (0, 1) if constant(producer.inputs[i]) is not None), None)
        if index is None or _array(producer, index).ndim != 1:
            return None
        found.append((producer, index))
        inner = producer.inputs[1 - index]
        assert inner is not None
        producer = inner.producer() if only_user(inner) is producer else None
    if producer is None or not is_op(producer, "MatMul", "Gemm") or weight_of(producer) is None:
        return None
    layer = Layer.of(producer)
    if not layer.transposed or (found and _array(*found[0]).size != layer.outputs):
        return None
    found.append((producer, 1))
    if len(producer.inputs) > 2 and producer.inputs[2] is not None:
        found.append((producer, 2))
    return tuple(found)


def _array_or_none(node: ir.Node, index: int) -> Array | None:
    return constant(node.inputs[index])


def _array(node: ir.Node, index: int) -> Array:
    array = _array_or_none(node, index)
    assert array is not None
    return array


def _peaks(graph: ir.Graph, values: list[ir.Value], inputs: Values) -> dict[ir.Value, Array]:
    """Largest magnitude of each channel [K] of ``values`` over the samples."""
    if not values:
        return {}
    program = compile_part([Unit((node,), False) for node in graph], values, None)
    peaks = {value: np.zeros((dims(value) or (0,))[-1]) for value in values}
    for index in range(min(SAMPLES, len(next(iter(inputs.values()))))):
        found = program.run({v: a[index : index + 1] for v, a in inputs.items()})
        for value, array in found.items():
            flat = np.abs(array).reshape(-1, array.shape[-1]).max(0)
            peaks[value] = np.maximum(peaks[value], flat)
    return peaks


def _factor(peak: Array, readers: tuple[ir.Node, ...]) -> Array:
    """s [K]; 1 for channels that are always zero or that no weight reads."""
    weight = np.zeros(len(peak))
    for node in readers:
        layer = Layer.of(node)
        weight = np.maximum(weight, np.abs(layer.weight).max(1 if layer.transposed else 0))
    alive = (peak > 0) & (weight > 0)
    factor = np.ones(len(peak))
    factor[alive] = peak[alive] ** STRENGTH / weight[alive] ** (1 - STRENGTH)
    if alive.any():
        # Only proportions matter: around 1, weights and activations keep their magnitude.
        factor[alive] /= np.exp(np.log(factor[alive]).mean())
    result: Array = np.clip(factor, 1 / LIMIT, LIMIT)
    return result


class _Editor:
    """Puts new constants and the Mul of case 3 into one graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.names = {*graph.initializers, *(v.name for v in graph.inputs)}
        self.names |= {v.name for n in graph.all_nodes() for v in n.outputs}

    def _fresh(self, hint: str) -> str:
        count = 0
        while f"{hint}_{count}" in self.names:
            count += 1
        self.names.add(f"{hint}_{count}")
        return f"{hint}_{count}"

    def _initializer(self, array: Array, hint: str) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=self._fresh(hint))
        value = ir.Value(
            name=tensor.name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def replace(self, node: ir.Node, index: int, array: Array) -> None:
        """Give ``node`` a constant of its own, and drop the old one if nobody else reads it."""
        old = node.inputs[index]
        assert old is not None
        node.replace_input_with(index, self._initializer(array, f"{name_of(old)}/smoothed"))
        if not old.uses() and not old.is_graph_output():
            self.graph.initializers.pop(name_of(old), None)

    def divide(self, value: ir.Value, readers: tuple[ir.Node, ...], factor: Array) -> None:
        """Let ``readers`` see ``value`` / ``factor``."""
        name = name_of(value)
        inverse = self._initializer(1 / factor, f"{name}/smoothing")
        mul = ir.node("Mul", [value, inverse], name=self._fresh(f"{name}/smoothed"))
        output = mul.outputs[0]
        output.name, output.shape, output.type = self._fresh(name), value.shape, value.type
        producer = value.producer()
        assert producer is not None
        self.graph.insert_after(producer, mul)
        for node in readers:
            node.replace_input_with(0, output)
