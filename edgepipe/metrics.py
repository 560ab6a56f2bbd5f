"""How far a result is from its reference: accumulated over any number of samples.

Definitions, over all elements ``r`` of the reference and ``y`` of the result:
SNR = 10·log10(Σr² / Σ(y−r)²) in dB, cosine = Σry / √(Σr²·Σy²), max abs = max|y−r|.
Top-1 agreement is the share of rows whose largest element has the same index (the first of
equals, as NumPy's argmax takes it).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

Array = NDArray[Any]


@dataclass
class Distance:
    """Accumulates the distance of one output from its reference, in float64."""

    signal: float = 0.0
    noise: float = 0.0
    dot: float = 0.0
    power: float = 0.0
    max_abs: float = 0.0
    #: Elements where one of the two is not finite and the other differs.
    broken: int = 0
    elements: int = 0
    rows: int = 0
    agreeing: int = 0

    def add(self, result: Array, reference: Array) -> None:
        """Account for one result. Shapes must be equal; raises ValueError when they are not."""
        if result.shape != reference.shape:
            raise ValueError(f"shape {result.shape} against a reference of {reference.shape}")
        y = np.asarray(result, dtype=np.float64).ravel()
        r = np.asarray(reference, dtype=np.float64).ravel()
        finite = np.isfinite(y) & np.isfinite(r)
        if not finite.all():
            same = (y == r) | (np.isnan(y) & np.isnan(r))
            self.broken += int(np.count_nonzero(~finite & ~same))
            y, r = y[finite], r[finite]
        difference = y - r
        self.signal += float(r @ r)
        self.noise += float(difference @ difference)
        self.dot += float(r @ y)
        self.power += float(y @ y)
        if difference.size:
            self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        self.elements += result.size
        if has_classes(reference.shape):
            self.rows += reference.shape[0]
            self.agreeing += int(np.count_nonzero(top1(result) == top1(reference)))

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio; infinite where results are equal, −infinite where one is not
        finite and its reference is, or where the reference is all zero and the result is not."""
        if self.broken:
            return -math.inf
        if self.noise == 0.0:
            return math.inf
        return 10.0 * math.log10(self.signal / self.noise) if self.signal > 0.0 else -math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity; 1 where both are all zero."""
        if self.signal == 0.0 and self.power == 0.0:
            return 1.0
        product = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.dot / product if product > 0.0 else 0.0

    @property
    def top1_agreement(self) -> float | None:
        """Share of rows with the same winner, or None where the output has no classes."""
        return self.agreeing / self.rows if self.rows else None


#: Bins of ``Steps`` per octave: a difference up to 4 % beyond a step counts as within it.
_BINS = 16


@dataclass
class Steps:
    """Accumulates how far results are from their reference, to be told in steps afterwards: what
    one step is, the span of all references may have to say."""

    low: float = 0.0
    high: float = 0.0
    largest: float = 0.0
    elements: int = 0
    equal: int = 0
    bins: Counter[int] = field(default_factory=Counter)

    def add(self, result: Array, reference: Array) -> None:
        """Account for one result of any numeric dtype. NaN and infinities are never within."""
        y, r = (np.asarray(a, dtype=np.float64).ravel() for a in (result, reference))
        same = (y == r) | (np.isnan(y) & np.isnan(r))
        self.elements += r.size
        self.equal += int(np.count_nonzero(same))
        finite = np.isfinite(r)
        if finite.any() and np.asarray(reference).dtype.kind == "f":
            self.low = min(self.low, float(r[finite].min()))
            self.high = max(self.high, float(r[finite].max()))
        with np.errstate(invalid="ignore"):  # of infinities that are the same
            difference = np.abs(y - r)[~same]
        if not np.isfinite(difference).all():
            self.largest = math.inf
            difference = difference[np.isfinite(difference)]
        if difference.size:
            self.largest = max(self.largest, float(difference.max()))
            found = np.floor(np.log2(difference) * _BINS).astype(int)
            self.bins.update(dict(zip(*np.unique(found, return_counts=True), strict=True)))

    @property
    def span(self) -> float:
        """The range of the references' floats, zero included: what an 8-bit grid would cover."""
        return self.high - self.low

    def share_within(self, step: float) -> float:
        """Share of values at most ``step`` from their reference."""
        if step <= 0.0:
            near = self.equal
        else:
            last = math.floor(math.log2(step) * _BINS)
            near = self.equal + sum(count for bin, count in self.bins.items() if bin <= last)
        return near / self.elements if self.elements else 1.0


def has_classes(shape: tuple[int, ...]) -> bool:
    """Whether an output looks like class scores: [batch, classes ≥ 2]."""
    return len(shape) == 2 and shape[1] >= 2


def top1(scores: Array) -> Array:
    """Index of the largest score of each row of [batch, classes]."""
    winners: Array = np.argmax(scores, axis=1)
    return winners


@dataclass
class Accuracy:
    """Accumulates top-1 accuracy of class scores [batch, classes] against int labels [batch]."""

    right: int = 0
    total: int = 0

    def add(self, scores: Array, labels: Array) -> None:
        """Account for one batch."""
        self.right += int(np.count_nonzero(top1(scores) == labels))
        self.total += len(labels)

    @property
    def top1(self) -> float:
        """Share of rows whose winner is the label."""
        return self.right / self.total if self.total else math.nan


def snr_db(result: Array, reference: Array) -> float:
    """SNR of ``result`` against ``reference`` (any equal shapes) in dB."""
    distance = Distance()
    distance.add(np.asarray(result), np.asarray(reference))
    return distance.snr_db


def float64_reference(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name of ``model`` evaluated in float64 (see ``edgepipe.float64``)."""
    from edgepipe.float64 import Float64Model

    return Float64Model(model).run(inputs)
