"""Removes whole channels: the network that is left is dense and smaller.

Which go: those whose loss the layers that read them make up for best. Of a reader with inputs'
covariance H and weights W, taking the columns c away costs tr(W_c [H⁻¹]_cc⁻¹ W_cᵀ) where the others
are refitted (second order; Hassibi and Stork 1992, "OBS", by blocks of columns), as a share of its
output's variance. Without data it is the share of its squared weights, and that of the filters that
make the channel (Li et al. 2017, arXiv 1608.08710).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.prune import walk
from edgepipe.prune.coupling import Coupling, Slice
from edgepipe.prune.layers import replace, set_weight
from edgepipe.quantization.graph import Array, constant, dims
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.placement import weight_of
from edgepipe.sparsity.pruning import DAMPING

#: Channels stay in multiples of this, the vectors of Arm and WebAssembly, where there are many.
VECTOR = 4
MANY = 16


@dataclass(frozen=True)
class Removal:
    """``gone``: classes of ``coupling`` that go. ``channels``: before and after, by layer."""

    coupling: Coupling
    gone: frozenset[int]
    channels: dict[str, tuple[int, int]]

    def stays(self, ids: Array) -> Array:
        """Which of the channels ``ids`` stay, bool."""
        found: Array = ~np.isin(self.coupling.roots(ids), list(self.gone))
        return found


def choose(
    model: ir.Model, coupling: Coupling, percent: float, samples: Sequence[Any] | None
) -> Removal:
    """``percent`` of the channels of every family, the least important ones."""
    scores = _scores(model, coupling, samples)
    gone = set()
    for family in coupling.families():
        kept = _kept(len(family), percent)
        order = sorted(family, key=lambda root: (scores[root], root))
        gone.update(order[: len(family) - kept])
    removal = Removal(coupling, frozenset(gone), {})
    for node, ids in coupling.makers:
        removal.channels[node.name or node.outputs[0].name or ""] = (
            len(ids), int(removal.stays(ids).sum()),
        )  # fmt: skip
    return removal


def _kept(count: int, percent: float) -> int:
    kept = count * (1 - percent / 100)
    if count >= MANY:
        return min(count, max(VECTOR, VECTOR * round(kept / VECTOR)))
    return max(1, round(kept))


def refit(model: ir.Model, dense: ir.Model, removal: Removal, samples: Sequence[Any]) -> None:
    """Give every layer that reads channels the weights that reproduce the dense network's output
    from those that stay; the others get zeros. ``model`` keeps its shapes."""
    readers = {node: ids for node, ids in removal.coupling.readers if _has_moments(node)}
    for cut in removal.coupling.slices:
        if cut.index == 1 and cut.axis == Layer.of(cut.node).input_axis and cut.node not in readers:
            array = constant(cut.node.inputs[1])
            assert array is not None
            shape = [-1 if axis == cut.axis else 1 for axis in range(array.ndim)]
            replace(cut.node, 1, array * removal.stays(cut.ids).reshape(shape))
    for node, gram in walk.moments(dense.graph, model.graph, list(readers), samples):
        layer = Layer.of(node)
        columns = np.repeat(removal.stays(readers[node]), _taps(layer))
        set_weight(node, np.broadcast_to(columns, (layer.outputs, len(columns))), gram)


def shrink(graph: ir.Graph, removal: Removal) -> None:
    """Take the channels out of weights and shapes. The function of ``graph`` is then that of the
    same graph with zeros in what reads them."""
    coupling = removal.coupling
    for cut in coupling.slices:
        array = constant(cut.node.inputs[cut.index])
        assert array is not None
        kept = removal.stays(cut.ids)
        if not kept.all():
            replace(cut.node, cut.index, np.compress(kept, array, axis=cut.axis))
    for entry in coupling.extents:
        _set_extent(entry, int(removal.stays(entry.ids).sum()))
    for node, ids in coupling.depthwise:
        node.attributes["group"] = ir.AttrInt64("group", int(removal.stays(ids).sum()))
    for value, channels in coupling.of.items():
        shape = list(dims(value) or ())
        shape[channels.axis] = int(removal.stays(channels.ids).sum())
        value.shape = ir.Shape(shape)


def _set_extent(entry: Slice, count: int) -> None:
    array = constant(entry.node.inputs[entry.index])
    assert array is not None
    if array[entry.axis] != count:
        changed = array.copy()
        changed[entry.axis] = count
        replace(entry.node, entry.index, changed)


def _has_moments(node: ir.Node) -> bool:
    if weight_of(node) is None:
        return False
    layer = Layer.of(node)
    return layer.has_columns and layer.groups == 1


def _taps(layer: Layer) -> int:
    return int(np.prod(layer.weight_shape[2:])) if layer.node.op_type == "Conv" else 1


def _scores(model: ir.Model, coupling: Coupling, samples: Sequence[Any] | None) -> dict[int, float]:
    """What each class is worth, as shares of outputs."""
    scores: dict[int, float] = dict.fromkeys(
        (int(root) for _, ids in coupling.makers for root in coupling.roots(ids)), 0.0
    )
    with_moments = [n for n, _ in coupling.readers if samples is not None and _has_moments(n)]
    grams = {}
    if samples is not None:
        walked = walk.moments(model.graph, model.graph, with_moments, samples)
        for node, gram in walked:
            grams[node] = _losses(coupling, node, gram.hessian[0])
    for node, ids in coupling.readers:
        shares = grams[node] if node in grams else _sizes(coupling, node, ids)
        for root, share in shares.items():
            scores[root] += share
    if samples is None:
        for node, ids in coupling.makers:
            for root, share in _sizes(coupling, node, ids, made=True).items():
                scores[root] += share
    return scores


def _losses(coupling: Coupling, node: ir.Node, hessian: Array) -> dict[int, float]:
    """Second-order loss of each class that ``node`` reads, relative to its output's variance."""
    layer = Layer.of(node)
    ids = next(ids for reader, ids in coupling.readers if reader is node)
    owner = np.repeat(coupling.roots(ids), _taps(layer))
    weight = layer.matrix(layer.weight)[0].astype(np.float64)
    damping = DAMPING * max(float(np.trace(hessian)) / len(hessian), 1e-12)
    inverse = np.linalg.inv(hessian + damping * np.eye(len(hessian)))
    total = max(float(np.einsum("ok,kl,ol->", weight, hessian, weight, optimize=True)), 1e-30)
    losses = {}
    for root in np.unique(owner):
        places = np.flatnonzero(owner == root)
        solved = np.linalg.solve(inverse[np.ix_(places, places)], weight[:, places].T)
        losses[int(root)] = float(np.sum(weight[:, places].T * solved)) / total
    return losses


def _sizes(coupling: Coupling, node: ir.Node, ids: Array, made: bool = False) -> dict[int, float]:
    """Share of each class in the squared weights of ``node``, as a reader or as a maker."""
    layer = Layer.of(node)
    axis = layer.axis if made else layer.input_axis
    squares = np.square(layer.weight.astype(np.float64))
    each = squares.sum(tuple(a for a in range(squares.ndim) if a != axis))
    owner = coupling.roots(ids)
    if len(each) < len(owner):  # of a group, whose places the others share
        owner = owner[: len(each)]
    total = max(float(each.sum()), 1e-30)
    losses: dict[int, float] = {}
    for root, size in zip(owner, each, strict=True):
        losses[int(root)] = losses.get(int(root), 0.0) + float(size) / total
    return losses
