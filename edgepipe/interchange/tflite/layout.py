"""Where the channels of a tensor are stored.

tflite computes images as [N, H, W, C]. A tensor of the graph with axes [N, C, H, W] can be stored
*plain*, in its own order, or *channels last*; one with axes [N, C, L] channels last is
[N, 1, L, C], so that convolutions over one axis are images of one row. Operators say which one
they need, and the translation converts where two disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from edgepipe.interchange.tflite.network import Grid

T = TypeVar("T")

#: Rank of the graph's tensor → its axis at each stored position; None is an axis of length one.
CHANNELS_LAST: dict[int, tuple[int | None, ...]] = {3: (0, None, 2, 1), 4: (0, 2, 3, 1)}


@dataclass(frozen=True)
class Place:
    """A stored tensor: its index, and how the axes of the graph's tensor lie in it.

    ``shape`` is the one of the graph. ``grid`` None is float32. ``flattened`` is (C, H, W) where
    the features of [N, C·H·W] lie in the order H, W, C instead.
    """

    index: int
    shape: tuple[int, ...]
    grid: Grid | None
    channels_last: bool = False
    flattened: tuple[int, int, int] | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return arrange(self.shape, self.channels_last, 1)

    def arrange(self, values: Sequence[T], missing: T) -> tuple[T, ...]:
        """One value per axis of the graph → one per stored axis."""
        return arrange(values, self.channels_last, missing)

    def axis(self, axis: int) -> int:
        """Where an axis of the graph (may be negative) is stored."""
        positive = axis % len(self.shape)
        order = CHANNELS_LAST[len(self.shape)] if self.channels_last else range(len(self.shape))
        return list(order).index(positive)


def arrange(values: Sequence[T], channels_last: bool, missing: T) -> tuple[T, ...]:
    """One value per axis of the graph → one per stored axis."""
    if not channels_last:
        return tuple(values)
    return tuple(missing if axis is None else values[axis] for axis in CHANNELS_LAST[len(values)])


def same_order(shape: Sequence[int], permutation: Sequence[int]) -> bool:
    """Whether a transposition moves only axes of length one, so that a reshape does it."""
    moved = [axis for axis in permutation if shape[axis] != 1]
    return moved == sorted(moved)
