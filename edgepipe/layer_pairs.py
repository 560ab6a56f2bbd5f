"""Tensors of the float network and their rounded forms in the Q/DQ network, matched and summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe.metrics import Array
from edgepipe.quantization.graph import bounds, code_range, constant, dims, is_op, name_of

if TYPE_CHECKING:
    import onnx_ir as ir

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: How the quantization names the rounded form of a tensor.
_ROUNDED = "/rounded"


@dataclass
class LayerPair:
    """A float tensor, its counterpart in the Q/DQ graph, and sums over all runs per channel."""

    exact: ir.Value
    rounded: ir.Value
    layer: ir.Node | None
    weight_bits: int | None
    sources: list[str]
    codes: tuple[float, float, float] | None  # floats of the first and last code, and the step
    rescaled: bool
    sums: Any = None
    low: float = float("inf")
    high: float = float("-inf")
    beyond: int = 0
    elements: int = 0
    seen: set[int] = field(default_factory=set)

    def add(self, exact: Array, rounded: Array) -> None:
        """Account for one run."""
        r, y = (_channels(a, self.rescaled) for a in (exact, rounded))
        sums = np.stack([np.sum(a * b, axis=1) for a, b in ((r, r), (r, y), (y, y))])
        self.sums = sums if self.sums is None else self.sums + sums
        self.elements += exact.size
        self.low, self.high = min(self.low, float(r.min())), max(self.high, float(r.max()))
        if self.codes is not None:
            low, high, step = self.codes
            if not self.rescaled:
                outside = (exact < low - step / 2) | (exact > high + step / 2)
                self.beyond += int(np.count_nonzero(outside))
            self.seen.update(np.unique(np.rint((rounded - low) / step).astype(int)).tolist())

    @property
    def saturation(self) -> float | None:
        """Share of the float values beyond the last codes; None where that cannot be told."""
        return None if self.codes is None or self.rescaled else self.beyond / self.elements

    @property
    def codes_used(self) -> float | None:
        """Share of the codes that occurred."""
        if self.codes is None:
            return None
        low, high, step = self.codes
        return len(self.seen) / (round((high - low) / step) + 1)

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio; of rescaled channels after the best factor of each."""
        rr, ry, yy = self.sums
        noise = rr - 2 * ry + yy
        if self.rescaled:
            noise = rr - np.divide(ry**2, yy, out=np.zeros_like(rr), where=yy > 0)
        total = max(float(noise.sum()), 0.0)
        signal = float(rr.sum())
        if total <= 1e-15 * signal or total == 0.0:
            return float("inf")
        return 10 * float(np.log10(signal / total)) if signal > 0 else float("-inf")


def _channels(array: Array, split: bool) -> Array:
    """[channels, rest] float64; one channel where they need not be told apart."""
    whole = np.asarray(array, np.float64)
    if not split or whole.ndim < 2:
        return whole.reshape(1, -1)
    axis = 2 if whole.ndim == 3 else 1
    return np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1)


def match(
    exact: ir.Model, rounded: ir.Model, *, rescaled: bool, same_nodes: bool
) -> list[LayerPair]:
    """Rounded tensors and outputs of the Q/DQ graph with their float values, in graph order.

    They are matched by the names that the quantization gives; where both graphs have the
    ``same_nodes`` a rounded tensor has the same name in both.
    """
    there = {v.name: v for v in rounded.graph.inputs}
    there |= {v.name: v for node in rounded.graph for v in node.outputs}
    restored = _restored(rounded) if same_nodes else set()
    nodes = {node.name: node for node in rounded.graph}
    outputs = {v.name for v in exact.graph.outputs}
    computed = (n for n in exact.graph if not is_op(n, "QuantizeLinear", "DequantizeLinear"))
    values = [*exact.graph.inputs, *(v for node in computed for v in node.outputs)]

    def counterpart(name: str) -> ir.Value | None:
        found = None if same_nodes else there.get(f"{name}{_ROUNDED}")
        return there.get(name) if found is None and name in outputs | restored else found

    order = {node: index for index, node in enumerate(exact.graph)}
    found: list[LayerPair] = []
    known: dict[str, LayerPair] = {}
    for value in values:
        name = value.name or ""
        other = counterpart(name)
        if other is None or dims(value) is None or dims(other) != dims(value):
            continue
        layer = _layer(value, order, lambda name: counterpart(name) is not None)
        pair = LayerPair(
            value, other, layer, _weight_bits(nodes.get(layer.name if layer else None)),
            _sources(value, known), _codes(other), rescaled and name not in outputs,
        )  # fmt: skip
        found.append(pair)
        known[name] = pair
    return found


def _restored(rounded: ir.Model) -> set[str]:
    """Names of activations behind a Q/DQ pair."""
    found = set()
    for node in rounded.graph:
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] else None
        if is_op(node, "DequantizeLinear") and is_op(before, "QuantizeLinear"):
            found.add(name_of(node.outputs[0]))
    return found


def _layer(
    value: ir.Value, order: Mapping[ir.Node, int], rounded: Callable[[str], bool]
) -> ir.Node | None:
    """The node that computes ``value``, past the additions and activations that it takes along: of
    two that meet in an Add the later one. None for an input of the model."""
    node = value.producer()
    while node is not None and (is_op(node, "Add") or bounds(node) is not None):
        inputs = [v for v in node.inputs if v is not None and v.const_value is None]
        inner = [v.producer() for v in inputs if not rounded(name_of(v))]
        if not inner:
            return node  # what it adds is rounded before
        made = [n for n in inner if n is not None and len(list(n.outputs[0].uses())) == 1]
        linear = [n for n in made if is_op(n, *_LINEAR)] or made
        if not linear:
            return None if inner == [None] else node
        node = max(linear, key=lambda n: order[n])
    return node


def _sources(value: ir.Value, known: Mapping[str, LayerPair]) -> list[str]:
    """The nearest compared tensors upstream."""
    found: dict[str, None] = {}
    pending = [value.producer()]
    visited = set()
    while pending:
        node = pending.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        for source in node.inputs:
            if source is None or source.const_value is not None:
                continue
            if source.name in known:
                found[name_of(source)] = None
            else:
                pending.append(source.producer())
    return list(found)


def _weight_bits(node: ir.Node | None) -> int | None:
    if node is None or not is_op(node, *_LINEAR) or node.inputs[1] is None:
        return None
    restore = node.inputs[1].producer()
    if not is_op(restore, "DequantizeLinear"):
        return None
    assert restore is not None and restore.inputs[0] is not None
    if restore.inputs[0].const_value is None:
        return None  # a product of two activations
    dtype = restore.inputs[0].dtype
    return int(dtype.bitwidth) if dtype is not None else None


def _codes(value: ir.Value) -> tuple[float, float, float] | None:
    """What the first and the last code of a dequantised tensor stand for, and the step."""
    restore = value.producer()
    rounding = restore.inputs[0].producer() if restore is not None and restore.inputs[0] else None
    if not is_op(restore, "DequantizeLinear") or not is_op(rounding, "QuantizeLinear"):
        return None
    assert rounding is not None and rounding.inputs[0] is not None
    limits = code_range(rounding)
    if limits is None:
        return None
    scale = constant(rounding.inputs[1])
    assert scale is not None
    cut = rounding.inputs[0].producer()
    ends = bounds(cut) if cut is not None and name_of(cut.outputs[0]).endswith("/cut") else None
    if ends is not None:
        limits = max(limits[0], ends[0]), min(limits[1], ends[1])
    return *limits, float(scale.reshape(()))
