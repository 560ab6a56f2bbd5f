"""Scales of weights: symmetric, per output channel or per group, and rounding onto them.

Arrays are [..., K] with one scale per leading index ([..., 1]).
"""

from __future__ import annotations

import numpy as np

from edgepipe.quantization.graph import Array

#: Share of the largest weight that the scale search tries to reach.
SHARES = np.linspace(1.0, 0.3, 71)
#: Weights smaller than this are a dead channel: their scale is 1 and their codes 0.
DEAD = 1e-30


def limits(bits: int) -> tuple[int, int]:
    """Lowest and highest code. 8 bits leave −128 out, as integer kernels expect; 4 bits do not."""
    high = 2 ** (bits - 1) - 1
    return (-high if bits == 8 else -high - 1), high


def quantize(weight: Array, scale: Array, bits: int) -> Array:
    """Nearest codes, float (integers held exactly), saturated."""
    low, high = limits(bits)
    return np.clip(np.rint(weight / scale), low, high)


def covering(weight: Array, bits: int) -> Array:
    """The scale [..., 1] at which nothing saturates; 1 for a channel of zeros."""
    peak = np.abs(weight).max(-1, keepdims=True)
    return np.where(peak > DEAD, peak / limits(bits)[1], 1.0).astype(weight.dtype)


def least_error(weight: Array, bits: int, importance: Array | None = None) -> Array:
    """The scale [..., 1] of least squared rounding error, by search below ``covering``.

    ``importance`` [..., K] weighs each element's error: the diagonal of the layer's Hessian.
    """
    full = covering(weight, bits)
    best = np.full_like(full, np.inf)
    chosen = full
    for share in SHARES:
        scale = full * share
        error = (quantize(weight, scale, bits) * scale - weight) ** 2
        if importance is not None:
            error = error * importance
        total = error.sum(-1, keepdims=True)
        better = total < best
        best, chosen = np.where(better, total, best), np.where(better, scale, chosen)
    return chosen
