"""How constant weights are stored: formats, and their packing into the rows that kernels read.

A kernel reads its weights row by row: one row holds what one input channel of one tap multiplies,
for the ``width`` output channels of a register tile. Codes are exact in float32, so the inner
loop only converts them; scales act on accumulators:

- one scale per output channel: once, when the tile is complete;
- one scale per group of input channels: accumulators are kept *in units of the current group's
  scale*. Where a group ends they are multiplied by the ratio of its scale to the next one's, at
  the end by the last scale. That takes no second set of accumulators.

4-bit codes are eight to an int32, of eight consecutive rows, the first in the lowest bits: a
vector of words gives every row by shifts alone, without widening.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Scales below this share of their channel's largest are lifted to it, their codes to zero: what
#: they contribute is far below float32, and ratios of scales stay finite.
_LEAST_SHARE = 2.0**-64
#: 4-bit codes in a word.
NIBBLES = 8


@dataclass(frozen=True)
class Run:
    """``groups`` consecutive groups of ``size`` input channels; their firsts."""

    channel: int
    group: int
    groups: int
    size: int


@dataclass(frozen=True)
class WeightFormat:
    """Storage of one kernel's weights; arithmetic is float32 in all of them.

    ``kind`` is ``float32``, ``float16``, ``int8`` or ``int4``. Integers are codes, weight = code
    x scale, with one float32 scale per output channel, or per ``group`` consecutive input
    channels of one output channel and tap where ``group`` is not 0; the last group may be short.
    """

    kind: str = "float32"
    group: int = 0

    @property
    def coded(self) -> bool:
        """Whether there are scales."""
        return self.kind in ("int8", "int4")

    @property
    def plain(self) -> bool:
        """Whether weights are read as they are."""
        return self.kind == "float32"

    @property
    def bits(self) -> int:
        """Of one weight, without scales."""
        return {"float32": 32, "float16": 16, "int8": 8, "int4": 4}[self.kind]

    @property
    def dtype(self) -> str:
        """Element type of the packed array. Halves are raw bits: not every back end has a half."""
        return {"float32": "float32", "float16": "int16", "int4": "int32"}.get(self.kind, "int8")

    @property
    def arrays(self) -> int:
        """Number of packed arrays: rows, then the factors of accumulators."""
        return 1 + self.coded

    def groups(self, channels: int) -> int:
        """Groups of one tap."""
        return -(-channels // self.group)

    def runs(self, channels: int) -> list[Run]:
        """The groups of one tap in runs of equal size."""
        whole, rest = divmod(channels, self.group)
        found = [Run(0, 0, whole, self.group)] if whole else []
        return found + ([Run(whole * self.group, whole, 1, rest)] if rest else [])

    def arguments(self, rows: int, width: int, factors: int) -> list[tuple[str, int, str]]:
        """Kernel arguments for so many rows of ``width``, and factors of accumulators."""
        packed = -(-rows // NIBBLES) if self.kind == "int4" else rows
        found = [("w", packed * width, self.dtype)]
        return found + ([("s", factors, "float32")] if self.coded else [])

    def __str__(self) -> str:
        if not self.coded:
            return self.kind
        return f"{self.kind} per " + (f"{self.group} channels" if self.group else "channel")


FLOAT32 = WeightFormat()


def store(format: WeightFormat, rows: np.ndarray) -> np.ndarray:
    """Rows ``[..., width]`` of weights or codes → the packed array ``[rows, width]``.

    For 4 bits ``[ceil(rows / 8), width]``, rows counted through all leading axes.
    """
    rows = rows.reshape(-1, rows.shape[-1])
    if format.kind == "float32":
        return np.ascontiguousarray(rows, np.float32)
    if format.kind == "float16":
        return np.ascontiguousarray(rows, np.float16).view(np.int16)
    if format.kind == "int8":
        return np.ascontiguousarray(rows, np.int8)
    nibbles = np.zeros((-(-len(rows) // NIBBLES), NIBBLES, rows.shape[1]), np.uint32)
    nibbles.reshape(-1, rows.shape[1])[: len(rows)] = rows.astype(np.uint8) & 15
    shifts = np.arange(0, 4 * NIBBLES, 4, dtype=np.uint32)[:, None]
    words: np.ndarray = np.bitwise_or.reduce(nibbles << shifts, axis=1)
    return words.view(np.int32)


def grouped(
    format: WeightFormat,
    codes: np.ndarray,
    scale: np.ndarray,
    starts: Sequence[int],
    width: int,
) -> list[np.ndarray]:
    """Grouped weights in the order of the loops: taps, groups, channels of a group.

    ``codes[taps, ci, co]``, ``scale[taps, groups, co]``; tile t has the columns ``starts[t]`` to
    ``starts[t] + width``. Returns rows to ``store``, ``[tile, taps * ci, width]``, and the factors
    that accumulators are multiplied by after each group, ``[tile, taps * groups, width]``.
    """
    taps, channels, columns = codes.shape
    usable, dropped = _usable(scale.reshape(-1, columns).astype(np.float64))
    spread = np.repeat(dropped.reshape(scale.shape), format.group, axis=1)[:, :channels]
    rows = np.where(spread, 0, codes).reshape(taps * channels, columns)
    factors = usable.copy()
    factors[:-1] /= usable[1:]

    def tiles(matrix: np.ndarray) -> np.ndarray:
        return np.stack([matrix[:, start : start + width] for start in starts])

    return [tiles(rows), np.ascontiguousarray(tiles(factors), np.float32)]


def _usable(scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales ``[groups, co]`` without those that vanish, and which these were."""
    largest = np.abs(scale).max(0, initial=0)
    dropped = np.abs(scale) <= largest * _LEAST_SHARE
    return np.where(dropped, np.where(largest > 0, largest, 1), scale), dropped


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """``array`` with its last axis filled up with zeros to ``size``."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])])
