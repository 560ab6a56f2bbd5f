"""How the nonzero weights of a convolution are stored, and what a kernel reads of them.

A weight ``w[co, ci, kh, kw]`` has *places* ``(tap, input channel)``. Three forms:

- ``shared``: ``width`` neighbouring output channels form a tile, and a place is stored where any of
  them is not zero: the pattern of N:M sparsity whose pattern is shared by ``width`` channels.
  Stored are the offset of every place in the input and a row of ``width`` weights;
- ``rows``: every output channel for itself, any pattern (CSR). Stored are the distance of every
  place from the one before, in one byte, and one weight. Where a distance does not fit, places
  with a weight of zero fill the gap;
- ``gathered``, of dense layers that have one row of inputs: every output for itself, any pattern.
  Stored are the place and the weight, and zeros that fill up a group of ``GATHERED``.

All have ``starts[tiles + 1]``, where the places of each tile or row begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: Largest distance of two places of a row.
LONGEST = 255
#: Places of an output that are gathered together.
GATHERED = 4


@dataclass(frozen=True)
class Sparse:
    """``form`` is "shared", "rows" or "gathered"; only tiles of shared places have a ``width``.
    ``places`` counts the stored ones of all tiles, ``nonzeros`` the weights that are not zero."""

    form: str
    width: int
    places: int
    nonzeros: int

    @property
    def weights(self) -> int:
        """Stored weights, zeros among them."""
        return self.places * self.width

    def __str__(self) -> str:
        if self.form != "shared":
            return f"{self.places} places"
        return f"{self.places} places shared by {self.width} channels"


def tiles_of(weight: np.ndarray, width: int) -> np.ndarray:
    """``w[co, ci, kh, kw]`` → ``[tiles, places, width]``, channels filled up with zeros; places in
    the order of taps, then input channels."""
    co = len(weight)
    matrix = weight.transpose(0, 2, 3, 1).reshape(co, -1)
    tiles = -(-co // width)
    grown = np.zeros((tiles * width, matrix.shape[1]), weight.dtype)
    grown[:co] = matrix
    return np.ascontiguousarray(grown.reshape(tiles, width, -1).transpose(0, 2, 1))


def shared(weight: np.ndarray, width: int) -> Sparse:
    """The shared form of a weight, without packing it."""
    kept = int(tiles_of(weight != 0, width).any(-1).sum())
    return Sparse("shared", width, kept, int(np.count_nonzero(weight)))


def rows(weight: np.ndarray) -> Sparse:
    """The row form of a weight."""
    distances, _, _ = pack_rows(weight)
    return Sparse("rows", 1, len(distances), int(np.count_nonzero(weight)))


def gathered(matrix: np.ndarray) -> Sparse:
    """The gathered form of the weights ``[outputs, inputs]`` of a dense layer."""
    counts = np.count_nonzero(matrix, axis=1)
    places = int((-(-counts // GATHERED)).sum()) * GATHERED
    return Sparse("gathered", 1, max(places, GATHERED), int(counts.sum()))


def pack_shared(weight: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(starts[tiles + 1] int32, places[n] int32, weights[n, width])``."""
    tiles = tiles_of(weight, width)
    tile, place = np.nonzero((tiles != 0).any(-1))
    starts = np.searchsorted(tile, np.arange(len(tiles) + 1)).astype(np.int32)
    return starts, place.astype(np.int32), np.ascontiguousarray(tiles[tile, place])


def pack_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``(distances[n] uint8, starts[co + 1] int32, weights[n])``; the first distance of a row is
    its place."""
    matrix = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    distances: list[np.ndarray] = []
    values: list[np.ndarray] = []
    starts = [0]
    for row in matrix:
        places = np.flatnonzero(row)
        gaps = np.diff(places, prepend=0)
        longer = (gaps - 1).clip(0) // LONGEST  # fillers before each place
        ends = np.cumsum(longer + 1) - 1
        steps = np.full(int((longer + 1).sum()), LONGEST, np.int64)
        steps[ends] = gaps - longer * LONGEST
        stored = np.zeros(len(steps), weight.dtype)
        stored[ends] = row[places]
        distances.append(steps)
        values.append(stored)
        starts.append(starts[-1] + len(steps))
    return (
        np.concatenate(distances).astype(np.uint8),
        np.array(starts, np.int32),
        np.concatenate(values),
    )


def pack_gathered(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``w[outputs, inputs]`` → ``(places[n] int64, starts[outputs + 1] int32, weights[n])``; starts
    count groups. What fills up a group is input 0 with a weight of zero."""
    counts = np.count_nonzero(matrix, axis=1)
    starts = np.concatenate([[0], np.cumsum(-(-counts // GATHERED))]).astype(np.int32)
    output, place = np.nonzero(matrix)
    number = np.arange(len(output)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = starts[output].astype(np.int64) * GATHERED + number
    size = max(int(starts[-1]), 1) * GATHERED
    places, stored = np.zeros(size, np.int64), np.zeros(size, matrix.dtype)
    places[at], stored[at] = place, matrix[output, place]
    return places, starts, stored


def offset_dtype(largest: int) -> str:
    """The narrowest type that holds offsets up to ``largest``."""
    return "uint16" if largest < 1 << 16 else "int32"
