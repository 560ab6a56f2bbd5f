"""How Winograd's kernels go over their output: parts of the channels, whose weights are transformed
once, strips of rows of tiles, whose inputs are, and the channels of one register tile."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from edgepipe.kernels.builder import loop, minimum, parallel, zero_border
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.template import Knobs

TAPS = 9
#: Bytes between the points of a workspace: multiples of 4096 bytes would share sets of a cache.
APART = 64
#: Bytes of transformed weights at a time: what a second-level cache holds, or streams from the next
#: one while a strip of inputs uses it.
_WEIGHT_BYTES = 1 << 20
#: Bytes of transformed inputs that stay in a second-level cache, from one register tile's channels
#: to the next's, and what as many again cost in addition.
INPUT_BYTES, _FAR = 1 << 19, 0.2


def along(length: int, side: int) -> int:
    """Tiles that cover ``length``. The last is moved back over its neighbour."""
    return -(-length // side)


def tiles_of(y: Blocked, side: int) -> int:
    """Tiles of one image."""
    return along(y.h, side) * along(y.w, side)


def points_of(side: int) -> int:
    """Products of a tile."""
    return (side + 2) ** 2


def parts(vectors: int, vector_bytes: int) -> int:
    """In how many parts ``vectors`` of output channels are taken, each of which has so many bytes
    of transformed weights."""
    most = max(1, _WEIGHT_BYTES // vector_bytes)
    return next(n for n in range(1, vectors + 1) if vectors % n == 0 and vectors // n <= most)


def strip(
    y: Blocked, side: int, tile_bytes: int, pixels: Callable[[int], int], most: int = INPUT_BYTES
) -> int:
    """Rows of tiles whose inputs are transformed together, ``tile_bytes`` a tile; ``pixels`` tells
    how many tiles a register tile has where there are so many."""
    down, across = along(y.h, side), along(y.w, side)

    def cost(rows: int) -> float:
        """Places in register tiles, what reading the weights again is worth included."""
        each = pixels(rows * across)
        far = max(0.0, tile_bytes * rows * across / most - 1)
        return -(-down // rows) * (-(-rows * across // each) * each + 8) * (1 + _FAR * far)

    return min(range(1, down + 1), key=cost)


class Loops(ABC):
    """The loops of a kernel being emitted; how it transforms and multiplies is its own.

    ``tiles`` are the register tiles of channels in one of ``splits`` parts of them.
    """

    target: Any

    def __init__(self, y: Blocked, side: int, knobs: Knobs, vectors: int) -> None:
        self.side, self.n, self.points = side, side + 2, points_of(side)
        self.down, self.across = along(y.h, side), along(y.w, side)
        self.rows, self.splits = min(knobs["rows"], self.down), knobs["splits"]
        self.places = self.rows * self.across
        self.pixels, self.blocks = min(knobs["pixels"], self.places), knobs["blocks"]
        self.tiles = vectors // self.splits // self.blocks
        self.y = y

    def run(self) -> None:
        strips = -(-self.down // self.rows)
        with parallel(self.splits) as split, parallel(self.y.n) as n:
            self.transform_weights(split)
            with parallel(strips) as strip:
                # The last strip is moved back over its neighbour.
                row = minimum(strip * self.rows, self.down - self.rows)
                self.transform_inputs(n, row)
                with loop(self.tiles) as tile:
                    self.multiply((n, row), tile, split * self.tiles + tile)
        zero_border(self.y, self.target)

    def corner(self, row: Any, column: Any) -> tuple[Any, Any]:
        """The first output of a tile."""
        y, x = row * self.side, column * self.side
        if self.y.h % self.side:
            y = minimum(y, self.y.h - self.side)
        if self.y.w % self.side:
            x = minimum(x, self.y.w - self.side)
        return y, x

    @abstractmethod
    def transform_weights(self, split: Any) -> None:
        """U = G g Gᵀ of a part of the channels."""

    @abstractmethod
    def transform_inputs(self, n: Any, first: Any) -> None:
        """V = Bᵀ d B of the tiles from row ``first`` on."""

    @abstractmethod
    def multiply(self, first: tuple[Any, Any], part: Any, tile: Any) -> None:
        """Outputs Aᵀ (U V) A of one register tile's channels and the strip whose image and row are
        ``first``; these weights are U's ``part``."""
