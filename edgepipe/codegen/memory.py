"""One arena for all intermediate tensors: offsets from lifetimes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgepipe.codegen.plan import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """A tensor of ``size`` bytes that is alive from call ``first`` to call ``last``, inclusive."""

    size: int
    first: int
    last: int


def align(size: int) -> int:
    """Round up to the alignment of every tensor."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def peak_live(tensors: Sequence[Lifetime]) -> int:
    """Largest sum of tensors alive at one call: no plan can use less."""
    if not tensors:
        return 0
    change = [0] * (max(t.last for t in tensors) + 2)
    for tensor in tensors:
        change[tensor.first] += align(tensor.size)
        change[tensor.last + 1] -= align(tensor.size)
    peak = live = 0
    for delta in change:
        live += delta
        peak = max(peak, live)
    return peak


def plan(tensors: Sequence[Lifetime]) -> tuple[list[int], int]:
    """Return the byte offset of each tensor and the arena's size.

    Greedy by size with best fit: the largest tensor first, each into the smallest gap, between
    those placed and alive at the same time, that holds it ("Efficient Memory Management for Deep
    Neural Net Inference", Pisarchyk and Lee, 2020). A second order, by first use, is tried as
    well; the smaller arena wins.
    """
    by_size = sorted(range(len(tensors)), key=lambda i: (-tensors[i].size, tensors[i].first, i))
    by_time = sorted(range(len(tensors)), key=lambda i: (tensors[i].first, -tensors[i].size, i))
    results = [_place(tensors, order) for order in (by_size, by_time)]
    return min(results, key=lambda r: r[1])


def _place(tensors: Sequence[Lifetime], order: Sequence[int]) -> tuple[list[int], int]:
    offsets = [0] * len(tensors)
    placed: list[int] = []  # by offset
    total = 0
    for index in order:
        tensor = tensors[index]
        best: tuple[int, int] | None = None
        cursor = 0
        for other in placed:
            if tensors[other].last < tensor.first or tensor.last < tensors[other].first:
                continue
            gap = offsets[other] - cursor
            if gap >= align(tensor.size) and (best is None or gap < best[0]):
                best = (gap, cursor)
            cursor = max(cursor, offsets[other] + align(tensors[other].size))
        offsets[index] = best[1] if best is not None else cursor
        total = max(total, offsets[index] + align(tensor.size))
        placed.append(index)
        placed.sort(key=lambda i: offsets[i])
    return offsets, total
