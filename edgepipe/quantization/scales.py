"""Scales of weights: symmetric, per output channel or per group, and rounding onto them.

Arrays are [..., K] with one scale per leading index ([..., 1]).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepipe.quantization.graph import Array

#: Share of the largest weight that the scale search tries to reach.
SHARES = np.linspace(1.0, 0.3, 71)
#: Weights smaller than this are a dead channel: their scale is 1 and their codes 0.
DEAD = 1e-30


@dataclass(frozen=True)
class CodeRange:
    """The codes a weight may have: integers ``low`` … ``high``, stored in ``bits``."""

    bits: int
    low: int
    high: int

    @classmethod
    def of(cls, bits: int, limit: int = 127) -> CodeRange:
        """All codes of ``bits``; of 8 bits those up to ``limit`` either way.

        8 bits leave −128 out, as integer kernels expect; 4 bits use −8.
        """
        return (
            cls(8, -limit, limit)
            if bits == 8
            else cls(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        )


def quantize(weight: Array, scale: Array, span: CodeRange) -> Array:
    """Nearest codes, float (integers held exactly), saturated."""
    return np.clip(np.rint(weight / scale), span.low, span.high)


def covering(weight: Array, span: CodeRange) -> Array:
    """The scale [..., 1] at which nothing saturates; 1 for a channel of zeros."""
    peak = np.abs(weight).max(-1, keepdims=True)
    return np.where(peak > DEAD, peak / span.high, 1.0).astype(weight.dtype)


def least_error(weight: Array, span: CodeRange, importance: Array | None = None) -> Array:
    """The scale [..., 1] of least squared rounding error, by search below ``covering``.

    ``importance`` [..., K] weighs each element's error: the diagonal of the layer's Hessian.
    """
    full = covering(weight, span)
    best = np.full_like(full, np.inf)
    chosen = full
    for share in SHARES:
        scale = full * share
        error = (quantize(weight, scale, span) * scale - weight) ** 2
        if importance is not None:
            error = error * importance
        total = error.sum(-1, keepdims=True)
        better = total < best
        best, chosen = np.where(better, total, best), np.where(better, scale, chosen)
    return chosen
