"""Ranges of activations from a stream of samples, in bounded memory.

Every observer sees arrays one at a time and keeps a histogram of ``BINS`` counts at most. Its
range grows by doubling around zero, so that old counts merge exactly, pair by pair. Minimum and
maximum are those of every element; the histogram takes at most ``PER_ARRAY`` elements of each
array, chosen at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edgepipe.quantization.graph import Array

BINS = 4096
PER_ARRAY = 1 << 14
#: Weight of the newest sample in the moving average.
MOMENTUM = 0.05
#: Shrunk ranges that MSE and entropy try, as a share of the full range.
SHARES = np.concatenate([np.linspace(1.0, 0.5, 51), np.linspace(0.48, 0.1, 20)])
#: A scale below this would make 1 / scale overflow in float32 arithmetic.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny) * 256


@dataclass(frozen=True)
class Grid:
    """A quantized tensor's codes: x ≈ (code − zero_point) · scale, low ≤ code ≤ high."""

    scale: np.float32
    zero_point: int
    low: int
    high: int

    def codes(self, x: Array) -> Array:
        """Nearest codes as int32, ties to even, saturated; division in float32 as ONNX has it."""
        scaled = np.rint(np.asarray(x, np.float32) / self.scale)
        moved = np.clip(scaled, self.low - self.zero_point, self.high - self.zero_point)
        result: Array = moved.astype(np.int32) + np.int32(self.zero_point)
        return result

    def values(self, codes: Array) -> Array:
        """What codes stand for, float32."""
        return (codes.astype(np.int32) - np.int32(self.zero_point)).astype(np.float32) * self.scale

    def round(self, x: Array) -> Array:
        """``x`` on the grid."""
        return self.values(self.codes(x))


def sample(flat: Array, most: int) -> Array:
    """Up to ``most`` elements, the same ones for equal sizes.

    At random: even steps would meet the same few columns of every image.
    """
    if flat.size <= most:
        return flat
    return flat[_places(flat.size, most)]


@lru_cache(maxsize=64)
def _places(size: int, most: int) -> Array:
    return np.random.default_rng(0).integers(0, size, most)


class Histogram:
    """Counts of a stream over a symmetric range that doubles when it must."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.reach = 0.0
        self.low = np.inf
        self.high = -np.inf
        self.average: tuple[float, float] | None = None

    def add(self, x: Array) -> None:
        """Account for the float array ``x``, finite throughout."""
        flat = x.reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.average is None:
            self.average = low, high
        else:
            a, b = self.average
            self.average = a + MOMENTUM * (low - a), b + MOMENTUM * (high - b)
        self._grow(max(-low, high, 0.0))
        if self.reach == 0.0:
            self.counts[BINS // 2] += flat.size
            return
        scaled = (sample(flat, PER_ARRAY).astype(np.float64) / self.reach + 1.0) * (BINS / 2)
        index = np.minimum(scaled.astype(np.int64), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    def _grow(self, needed: float) -> None:
        if needed <= self.reach:
            return
        if self.reach == 0.0:
            self.reach = needed
            return
        while self.reach < needed:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(BINS, np.int64)
            self.counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
            self.reach *= 2

    @property
    def centres(self) -> Array:
        """Middle of each bin, float64 [BINS]."""
        width = 2 * self.reach / BINS
        return -self.reach + width * (np.arange(BINS) + 0.5)

    def merge(self, other: Histogram) -> None:
        """Take in the counts of a tensor that shares this one's scale."""
        if other.average is None:
            return
        mine = self.average
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        theirs = other.average
        both = theirs if mine is None else (min(mine[0], theirs[0]), max(mine[1], theirs[1]))
        self.average = both
        self._grow(other.reach)
        if other.reach == 0.0 or self.reach == 0.0:
            self.counts[BINS // 2] += other.counts.sum()
            return
        filled = other.counts.nonzero()[0]
        index = ((other.centres[filled] / self.reach + 1.0) * (BINS / 2)).astype(np.int64)
        np.add.at(self.counts, index, other.counts[filled])


@dataclass(frozen=True)
class GridStyle:
    """What codes a tensor may have. ``bits`` 4 or 8."""

    bits: int
    signed: bool = False
    symmetric: bool = False

    def grid(self, low: float, high: float) -> Grid:
        """The grid that covers [low, high] and 0. A range of nothing gets scale 1."""
        low, high = min(low, 0.0), max(high, 0.0)
        levels = 2**self.bits - 1
        first = -(2 ** (self.bits - 1)) if self.signed else 0
        if self.symmetric and low < 0.0:
            reach = max(-low, high)
            scale = reach / (levels // 2)
            zero = first + 2 ** (self.bits - 1)
        else:
            scale = (high - low) / levels
            zero = first + round(-low / scale) if scale > 0.0 else first
        if scale == 0.0:
            scale = 1.0
        scale32 = np.float32(max(scale, SMALLEST_SCALE))
        return Grid(scale32, int(np.clip(zero, first, first + levels)), first, first + levels)


def choose(histogram: Histogram, observer: str, style: GridStyle, percentile: float) -> Grid:
    """The grid of a tensor by the named observer (config.OBSERVERS)."""
    if histogram.average is None:
        return style.grid(0.0, 0.0)
    if observer == "average":
        return style.grid(*histogram.average)
    if observer == "percentile":
        return style.grid(*_percentile(histogram, percentile))
    if observer == "mse":
        return _least_squared_error(histogram, style)
    if observer == "entropy":
        return _least_divergence(histogram, style)
    return style.grid(histogram.low, histogram.high)


def _percentile(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """Range that leaves (100 − percentile) % of the values outside, half at either end."""
    share = np.cumsum(histogram.counts) / max(histogram.counts.sum(), 1)
    outside = (100.0 - percentile) / 200.0
    edges = histogram.centres
    low = float(edges[np.searchsorted(share, outside)])
    high = float(edges[min(int(np.searchsorted(share, 1.0 - outside)), BINS - 1)])
    return max(low, histogram.low), min(high, histogram.high)


def _least_squared_error(histogram: Histogram, style: GridStyle) -> Grid:
    """Shrink both ends together, then each alone (coordinate search over SHARES)."""
    filled = histogram.counts.nonzero()[0]
    points, counts = histogram.centres[filled], histogram.counts[filled].astype(np.float64)
    points = np.clip(points, histogram.low, histogram.high)

    def error(low: float, high: float) -> float:
        grid = style.grid(low, high)
        return float(counts @ (grid.round(points) - points) ** 2)

    low, high = histogram.low, histogram.high
    _, share = min((error(low * s, high * s), -s) for s in SHARES)
    best = (low * -share, high * -share)
    if low < 0.0 < high and not style.symmetric:
        for end in (0, 1, 0):
            options = [
                (best[0] * s, best[1]) if end == 0 else (best[0], best[1] * s)
                for s in np.linspace(1.2, 0.6, 31)
            ]
            options = [(max(a, low), min(b, high)) for a, b in options]
            best = min((error(*option), i, option) for i, option in enumerate(options))[2]
    return style.grid(*best)


def _least_divergence(histogram: Histogram, style: GridStyle) -> Grid:
    """Least Kullback-Leibler divergence of the rounded distribution (Migacz 2017, TensorRT)."""
    filled = histogram.counts.nonzero()[0]
    points, counts = histogram.centres[filled], histogram.counts[filled].astype(np.float64)
    best: tuple[float, Grid] | None = None
    for share in SHARES:
        grid = style.grid(histogram.low * share, histogram.high * share)
        codes = grid.codes(points) - grid.low
        inside = np.bincount(codes, counts, grid.high - grid.low + 1)
        spread = np.bincount(codes, minlength=len(inside))
        clipped = grid.codes(points) != np.rint(points / grid.scale) + grid.zero_point
        # The rounded distribution spreads only what it did not clip.
        kept = np.bincount(codes, counts * ~clipped, len(inside))
        q = kept[codes] / np.maximum(spread[codes], 1)
        p = counts / counts.sum()
        q = (q + 1e-9 * q.sum() + 1e-30) / (q + 1e-9 * q.sum() + 1e-30).sum()
        divergence = float((p * np.log(p / q)).sum())
        if best is None or divergence < best[0]:
            best = (divergence, grid)
    assert best is not None
    return best[1]
