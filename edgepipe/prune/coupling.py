"""Which channels of a network can only go together.

Every element along the channel axis of a value belongs to a class. A convolution or dense layer
makes new ones; a depthwise one keeps its input's; Add, Mul and Concat along another axis make
their operands' the same, element by element; grouped convolutions tie the same place of all groups,
so that groups stay equal (the dependency graph of Fang et al. 2023, "DepGraph", arXiv 2301.12900,
by elements). What an operator without a rule reads is pinned, and so are outputs of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.graph import Array


@dataclass(frozen=True)
class Channels:
    """The channel axis of a value, and an element of the union-find per place."""

    axis: int
    ids: Array


@dataclass(frozen=True)
class Slice:
    """Input ``index`` of ``node`` has the channels ``ids`` along ``axis``."""

    node: ir.Node
    index: int
    axis: int
    ids: Array


class Coupling:
    """The classes of a canonical graph; ``channel_rules.couple`` fills it.

    ``of``: the channels of values. ``makers`` and ``readers``: layers that make new channels or mix
    those they read, with the channels. ``slices``: constants to cut with channels; ``extents``:
    entries (``axis``) of constant shapes that count them; ``depthwise``: nodes whose ``group``
    counts them. ``pins``: reason by element.
    """

    def __init__(self) -> None:
        self.of: dict[ir.Value, Channels] = {}
        self.makers: list[tuple[ir.Node, Array]] = []
        self.readers: list[tuple[ir.Node, Array]] = []
        self.slices: list[Slice] = []
        self.extents: list[Slice] = []
        self.depthwise: list[tuple[ir.Node, Array]] = []
        self.pins: dict[int, str] = {}
        self._parent: list[int] = []

    # -- classes --------------------------------------------------------------------------------

    def roots(self, ids: Array) -> Array:
        """The class of each element."""
        found: Array = np.array([self._root(int(i)) for i in ids], np.int64)
        return found

    def reason(self, root: int) -> str | None:
        """Why the class of ``root`` must stay, None where it may go."""
        return self._pinned().get(root)

    def pin(self, value: ir.Value | None, reason: str) -> None:
        """The channels of ``value`` stay."""
        if value in self.of:
            self.pins.update((int(i), reason) for i in self.of[value].ids)

    def _pinned(self) -> dict[int, str]:
        return {self._root(i): reason for i, reason in self.pins.items()}

    def families(self) -> list[list[int]]:
        """Classes that may go, by the set of layers that make them, in the order of the graph."""
        pinned, made = self._pinned(), dict[int, set[int]]()
        for number, (_, ids) in enumerate(self.makers):
            for root in self.roots(ids):
                made.setdefault(int(root), set()).add(number)
        read = {int(root) for _, ids in self.readers for root in self.roots(ids)}
        found: dict[frozenset[int], list[int]] = {}
        for root, numbers in made.items():
            if root not in pinned and root in read:
                found.setdefault(frozenset(numbers), []).append(root)
        return list(found.values())

    def _root(self, item: int) -> int:
        while self._parent[item] != item:
            self._parent[item] = self._parent[self._parent[item]]
            item = self._parent[item]
        return item

    def join(self, a: Array, b: Array) -> None:
        """Element by element, ``a`` and ``b`` become one class."""
        for left, right in zip(a, b, strict=True):
            first, second = sorted((self._root(int(left)), self._root(int(right))))
            self._parent[second] = first

    def fresh(self, count: int) -> Array:
        """New classes."""
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    # -- what rules use --------------------------------------------------------------------------

    def make(self, node: ir.Node, axis: int, count: int) -> Array:
        """``node`` writes new channels along ``axis``."""
        ids = self.fresh(count)
        self.of[node.outputs[0]] = Channels(axis, ids)
        self.makers.append((node, ids))
        return ids

    def cut(self, node: ir.Node, index: int, axis: int, ids: Array) -> None:
        """Constant input ``index`` has the channels ``ids`` along ``axis``."""
        self.slices.append(Slice(node, index, axis, ids))
