"""Runs the dense and the pruned network side by side, from one layer to the next.

A front holds what lies between the layers behind and those ahead, for every sample, so each node
runs once per sample whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.executor import Values, compile_part
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array, dims, name_of, outer_values
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.placement import Unit

#: Rows of each sample that enter the moments of a layer.
ROWS = 256
#: What the two fronts may take.
MEMORY_BYTES = 512 << 20


class Front:
    """The values of ``graph`` that nodes from ``place`` on read, [samples, *shape] each."""

    def __init__(self, graph: ir.Graph, samples: Sequence[Mapping[str, Any]]) -> None:
        self.nodes, self.place = list(graph), 0
        self.ends = set(graph.outputs)
        self.values: Values = {
            value: np.stack([np.asarray(s[name_of(value)]) for s in samples])
            for value in graph.inputs
            if not value.is_initializer()
        }

    def advance(self, place: int, also: Iterable[ir.Value] = ()) -> Values:
        """Run the nodes before ``place``; the front moves there. Returns the values ``also``,
        which those nodes write or which are in the front."""
        wanted = list(also)
        read = {v for node in self.nodes[place:] for v in outer_values(node)} | self.ends
        made = [v for node in self.nodes[self.place : place] for v in node.outputs]
        kept = [v for v in made if v in read or v in wanted]
        found = dict(self.values)
        if kept:
            part = compile_part(
                [Unit(tuple(self.nodes[self.place : place]), integer=False)], kept, None
            )
            found.update(part.run(self.values))
        self.values = {v: a for v, a in found.items() if v in read}
        self.place = place
        return {v: found[v] for v in wanted}


def affordable(graph: ir.Graph, count: int) -> int:
    """How many samples, ``count`` at most, two fronts have room for."""
    nodes = list(graph)
    last = {v: i for i, node in enumerate(nodes) for v in outer_values(node)}
    live = peak = sum(_bytes(v) for v in graph.inputs if not v.is_initializer())
    ending: dict[int, int] = {}
    for place, node in enumerate(nodes):
        for value in node.outputs:
            if value in last:
                live += _bytes(value)
                ending[last[value]] = ending.get(last[value], 0) + _bytes(value)
        peak = max(peak, live)
        live -= ending.get(place, 0)
    return max(1, min(count, MEMORY_BYTES // max(2 * peak, 1)))


def _bytes(value: ir.Value) -> int:
    return 4 * int(np.prod(dims(value) or (1,)))


def moments(
    dense: ir.Graph,
    pruned: ir.Graph,
    layers: Sequence[ir.Node],
    samples: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[ir.Node, Gram]]:
    """For each of ``layers``, nodes of ``pruned`` in its order: the moments of what it reads in the
    pruned network, whose layers before it may have been changed by then, and of what it writes in
    the dense one, of which ``pruned`` is a changed copy with the same nodes."""
    ours, theirs = Front(pruned, samples), Front(dense, samples)
    where = {node: place for place, node in enumerate(ours.nodes)}
    for node in layers:
        place, layer = where[node], Layer.of(node)
        source, result = node.inputs[0], theirs.nodes[place].outputs[0]
        assert source is not None
        x = ours.advance(place, [source])[source]
        y = theirs.advance(place + 1, [result])[result]
        yield node, _gram(layer, x, y)


def _gram(layer: Layer, x: Array, y: Array) -> Gram:
    columns = int(np.prod(layer.weight_shape)) // layer.outputs
    gram, random = Gram(1, layer.outputs, columns), np.random.default_rng(0)
    shape = y.shape[3:] if layer.node.op_type == "Conv" else y.shape[1:-1]
    for inputs, outputs in zip(x, y, strict=True):
        rows = np.sort(random.permutation(int(np.prod(shape)))[:ROWS])
        gram.add(layer.patches(inputs, rows), layer.rows(outputs, rows))
    return gram
