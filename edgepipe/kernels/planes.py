"""Kernels over planes (NCHW, ``lanes == 1``): vectors run along pixels, not along channels.

What they share: how a plane is cut into register tiles, and the fused store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgepipe.kernels.builder import load, minimum, splat, store
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.output import Fused
from edgepipe.kernels.template import Knobs
from edgepipe.target import Target


@dataclass(frozen=True)
class Cut:
    """A plane of ``height`` x ``width`` in tiles of ``rows`` x ``vectors`` vectors of ``lanes``.

    Tiles, and vectors in a row, overlap where they do not divide it: the same values, stored twice.
    """

    height: int
    width: int
    rows: int
    vectors: int
    lanes: int

    @classmethod
    def of(cls, height: int, width: int, lanes: int, most: int) -> Cut:
        """With at most ``most`` vectors in a tile; more in a row come before more rows."""
        while lanes > width:
            lanes //= 2
        across = -(-width // lanes)
        if across > most:
            across = -(-across // -(-across // most))
            return cls(height, width, 1, across, lanes)
        rows = min(height, most // across)
        return cls(height, width, -(-height // -(-height // rows)), across, lanes)

    def knobs(self, target: Target) -> Knobs:
        """The shape of a tile, and whether multiply-adds are fused in source."""
        return {
            "rows": self.rows,
            "vectors": self.vectors,
            "lanes": self.lanes,
            "fused": target.simd.fma and target.arch in ("aarch64", "arm"),
        }

    @property
    def tiles(self) -> tuple[int, int]:
        """Down and across."""
        return -(-self.height // self.rows), -(-self.width // (self.vectors * self.lanes))

    @property
    def count(self) -> int:
        """Vectors of a tile."""
        return self.rows * self.vectors

    @property
    def steps(self) -> list[int]:
        """First column of each vector of a row, from the tile's."""
        last = min(self.width, self.vectors * self.lanes) - self.lanes
        return [min(v * self.lanes, last) for v in range(self.vectors)]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and first column of each vector of a tile, from the tile's."""
        return [(row, step) for row in range(self.rows) for step in self.steps]

    def start(self, down: Any, across: Any) -> tuple[Any, Any]:
        """First row and column of a tile."""
        row = minimum(down * self.rows, self.height - self.rows)
        reach = min(self.width, self.vectors * self.lanes)
        return row, minimum(across * self.vectors * self.lanes, self.width - reach)


@dataclass(frozen=True)
class Joined(Cut):
    """Tiles of ``rows`` whole rows whose pixels follow one another: ``vectors`` run over all."""

    @classmethod
    def whole(cls, height: int, width: int, lanes: int, rows: int) -> Joined:
        """Tiles of ``rows`` rows."""
        while lanes > rows * width:
            lanes //= 2
        return cls(height, width, rows, -(-rows * width // lanes), lanes)

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.height // self.rows), 1

    @property
    def count(self) -> int:
        return self.vectors

    @property
    def steps(self) -> list[int]:
        last = self.rows * self.width - self.lanes
        return [min(v * self.lanes, last) for v in range(self.vectors)]

    @property
    def places(self) -> list[tuple[int, int]]:
        return [(0, step) for step in self.steps]

    def start(self, down: Any, across: Any) -> tuple[Any, Any]:
        return minimum(down * self.rows, self.height - self.rows), 0

    def runs(self, step: int) -> list[tuple[int, int, int, int]]:
        """Parts of the vector at ``step`` that lie in one row each, a power of two of pixels: the
        first lane, how many, and the row and column of the first from the tile's."""
        found, first = [], 0
        while first < self.lanes:
            row, column = divmod(step + first, self.width)
            count = min(self.lanes - first, self.width - column)
            count = 1 << count.bit_length() - 1
            found.append((first, count, row, column))
            first += count
        return found


def put(
    op: Fused, residuals: Sequence[Any], target: Any, place: tuple[Any, ...], value: Any, lanes: int
) -> None:
    """Apply the epilogue to ``lanes`` neighbouring pixels at ``place``, (n, channel, row, column),
    and store them. Operands are planes too, or one number per channel."""
    n, channel, row, column = place
    operands = []
    for buffer, layout in zip(residuals, op.residuals, strict=True):
        batch = 0 if layout.n == 1 else n
        if layout.h == layout.w == 1 and (op.y.h, op.y.w) != (1, 1):
            operands.append(splat(buffer[layout.offset(batch, channel, 0, 0)], lanes))
        else:
            operands.append(load(buffer, layout.offset(batch, channel, row, column), lanes))
    result = apply(op.epilogue, value, lanes, operands)
    store(target, op.y.offset(n, channel, row, column), result, lanes)
