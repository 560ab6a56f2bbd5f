"""The list of makers; modules beside this one fill it. A maker adds nodes to a Builder."""

from __future__ import annotations

from collections.abc import Callable

from tests.random_graphs.builder import Builder

Maker = Callable[[Builder], object]

#: Kind of graph → makers, as often as they are to be drawn.
MAKERS: dict[str, list[Maker]] = {"image": [], "sequence": [], "any": [], "integer": []}


def maker(**weights: int) -> Callable[[Maker], Maker]:
    """Register a maker for each kind of graph with a weight."""

    def register(function: Maker) -> Maker:
        for kind, weight in weights.items():
            MAKERS[kind] += [function] * weight
        return function

    return register
