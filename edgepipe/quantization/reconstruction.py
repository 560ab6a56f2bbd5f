"""Closed-form reconstruction of a layer: the integers whose output is nearest to the float one.

Linear algebra only, from second moments of the *quantized* input x and the float output y:
1. Target weights by least squares, W* = (C + λ W) (H + λ I)^-1 with H = cov(x), C = cov(y, x).
   The fewer bits, the smaller λ.
2. Scales by search, errors weighted with the diagonal of H.
3. Codes by GPTQ (Frantar et al. 2022) against W*: column by column, the error of each carried
   over to those that follow through the Cholesky factor of H^-1.
   From several scales, per output channel the best result stays.
4. Coordinate descent on the codes, (q s − W*) H (q s − W*)' never growing, alternating with
   the least-squares scale for fixed codes.
5. The bias takes the mean of the output.
"""

from __future__ import annotations

import numpy as np

from edgepipe.quantization import scales
from edgepipe.quantization.gptq import (
    BLOCK,
    Solution,
    Walk,
    centred,
    regularised,
    ridge,
    unit,
)
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array
from edgepipe.quantization.scales import CodeRange

#: The same for the target weights, by bits, towards the float ones. 8-bit weights lose little
#: themselves, and what follows the calibration images in them does not carry over to others
#: (measured at ridges from 0.0001 to 100: best at 10 to 100 for 8 bits, at 0.05 to 0.3 for 4).
TARGET_RIDGE = {4: 0.2, 8: 100.0}
SWEEPS = 3
#: Rounds of descent and scale, by bits: further ones gained 8 bits nothing (measured).
ALTERNATIONS = {4: 3, 8: 1}
#: Scales to start from, as shares of the one of least error, by bits: the best result stays.
STARTS = {4: (1.0, 0.9, 1.1), 8: (1.0,)}


def solve(weight: Array, gram: Gram, span: CodeRange, kept: Array | None = None) -> Solution:
    """Codes [groups, outputs, K], scales [groups, outputs, 1] and bias [groups, outputs].

    ``weight`` is the float matrix [groups, outputs, K]; where ``kept`` is False its codes are 0,
    and the others are fitted. Codes are floats holding integers.
    """
    single = unit(regularised(gram))
    walk = Walk.of(single)
    target = target_weights(weight, gram, span.bits)
    if kept is not None:  # pruning has fitted what stays
        target = np.ascontiguousarray(weight, np.float32)
    diagonal = np.diagonal(single, axis1=1, axis2=2)[:, None, :]
    first = scales.least_error(target, span, diagonal)
    best: tuple[Array, Array, Array] | None = None
    for share in STARTS[span.bits]:
        scale = (first * share).astype(np.float32)
        codes = walk.round(target, scale, span, kept)
        for _ in range(ALTERNATIONS[span.bits]):
            codes = descend(codes, target, single, scale, span, kept)
            scale = best_scale(codes, target, single, scale)
        found = codes, scale, _error(codes * scale - target, single)
        if best is None:
            best = found
        else:
            better = found[2] < best[2]
            codes, scale, error = (
                np.where(better, new, old) for new, old in zip(found, best, strict=True)
            )
            best = codes, scale, error
    assert best is not None
    return best[0], best[1], centred(best[0] * best[1], gram)


def _error(difference: Array, hessian: Array) -> Array:
    """d H d' of every output channel [groups, outputs, 1]."""
    result: Array = ((difference @ hessian) * difference).sum(-1, keepdims=True)
    return result


def target_weights(weight: Array, gram: Gram, bits: int) -> Array:
    """Least-squares weights, pulled towards the float ones by the ridge; float32."""
    share = TARGET_RIDGE[bits]
    hessian = regularised(gram, share)
    right = gram.cross + ridge(gram, share) * weight
    target = np.linalg.solve(hessian, right.transpose(0, 2, 1)).transpose(0, 2, 1)
    return np.ascontiguousarray(target, np.float32)


def descend(
    codes: Array, target: Array, hessian: Array, scale: Array, span: CodeRange,
    kept: Array | None = None,
) -> Array:  # fmt: skip
    """Coordinate descent over the integer codes until no code changes, SWEEPS at most. Those where
    ``kept`` is False stay 0."""
    codes = codes.copy()
    size = target.shape[-1]
    every = np.broadcast_to(scale, target.shape)
    diagonal = np.maximum(np.diagonal(hessian, axis1=1, axis2=2), 1e-12)
    gradient = (codes * scale - target) @ hessian
    for _ in range(SWEEPS):
        changed = False
        for start in range(0, size, BLOCK):
            stop = min(start + BLOCK, size)
            moved = np.zeros_like(codes[..., start:stop])
            for k in range(start, stop):
                step = gradient[..., k] / (diagonal[:, k, None] * every[..., k])
                new = np.clip(np.rint(codes[..., k] - step), span.low, span.high)
                if kept is not None:
                    new = new * kept[..., k]
                delta = (new - codes[..., k]) * every[..., k]
                if delta.any():
                    changed = True
                    codes[..., k] = new
                    gradient[..., start:stop] += delta[..., None] * hessian[:, None, k, start:stop]
                    moved[..., k - start] = delta
            if moved.any():
                gradient[..., :start] += moved @ hessian[:, start:stop, :start]
                gradient[..., stop:] += moved @ hessian[:, start:stop, stop:]
        if not changed:
            break
    return codes


def best_scale(codes: Array, target: Array, hessian: Array, scale: Array) -> Array:
    """The least-squares scale for fixed codes; the old one where the codes are orthogonal."""
    weighted = codes @ hessian
    above = (weighted * target).sum(-1, keepdims=True)
    below = (weighted * codes).sum(-1, keepdims=True)
    usable = (above > 0) & (below > 0)
    return np.where(usable, above / np.where(usable, below, 1), scale).astype(scale.dtype)
