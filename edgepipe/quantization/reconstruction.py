"""Closed-form reconstruction of a layer: the integers whose output is nearest to the float one.

Linear algebra only, from second moments of the *quantized* input x and the float output y:
1. Target weights by least squares, W* = (C + λ W) (H + λ I)^-1 with H = cov(x), C = cov(y, x).
2. Scales by search, errors weighted with the diagonal of H.
3. Codes by GPTQ (Frantar et al. 2022) against W*: column by column, the error of each carried
   over to those that follow through the Cholesky factor of H^-1.
4. Coordinate descent on the codes, (q s − W*) H (q s − W*)' never growing, alternating with
   the least-squares scale for fixed codes.
5. The bias takes the mean of the output.
"""

from __future__ import annotations

import numpy as np

from edgepipe.quantization import scales
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array

#: Ridge, as a share of the mean of the Hessian's diagonal: towards the float weights.
RIDGE = 0.01
SWEEPS = 3
ALTERNATIONS = 3
#: Columns whose updates are gathered before they reach the rest of the matrix.
BLOCK = 64


def solve(weight: Array, gram: Gram, bits: int) -> tuple[Array, Array, Array]:
    """Codes [groups, outputs, K], scales [groups, outputs, 1] and bias [groups, outputs].

    ``weight`` is the float matrix [groups, outputs, K]. Codes are floats holding integers.
    """
    hessian, target = target_weights(weight, gram)
    hessian = hessian.astype(np.float32)
    diagonal = np.diagonal(hessian, axis1=1, axis2=2)[:, None, :]
    scale = scales.least_error(target, bits, diagonal)
    codes = gptq(target, hessian, scale, bits)
    for _ in range(ALTERNATIONS):
        codes = descend(codes, target, hessian, scale, bits)
        scale = best_scale(codes, target, hessian, scale)
    mean = np.einsum("gok,gk->go", (codes * scale).astype(np.float64), gram.mean_x)
    return codes, scale, gram.mean_y - mean


def target_weights(weight: Array, gram: Gram) -> tuple[Array, Array]:
    """The regularised Hessian [groups, K, K] and least-squares weights, float32."""
    hessian = gram.hessian
    spread = np.einsum("gkk->g", hessian) / hessian.shape[-1]
    ridge = (RIDGE * spread + 1e-9)[:, None, None]
    hessian = hessian + ridge * np.eye(hessian.shape[-1])
    right = gram.cross + ridge * weight
    target = np.linalg.solve(hessian, right.transpose(0, 2, 1)).transpose(0, 2, 1)
    return hessian, np.ascontiguousarray(target, np.float32)


def inverse_factor(hessian: Array) -> Array:
    """Upper Cholesky factor of H^-1 [groups, K, K], as GPTQ walks it."""
    inverse = np.linalg.inv(hessian.astype(np.float64))
    lower = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2)
    return np.ascontiguousarray(lower.transpose(0, 2, 1), np.float32)


def gptq(target: Array, hessian: Array, scale: Array, bits: int) -> Array:
    """Codes for ``target`` by error feedback; ``scale`` [groups, outputs, 1 or K]."""
    factor = inverse_factor(hessian)
    low, high = scales.limits(bits)
    size = target.shape[-1]
    every = np.broadcast_to(scale, target.shape)
    work, codes = target.copy(), np.empty_like(target)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = np.empty_like(work[..., start:stop])
        for k in range(start, stop):
            codes[..., k] = np.clip(np.rint(work[..., k] / every[..., k]), low, high)
            error = (work[..., k] - codes[..., k] * every[..., k]) / factor[:, k, k, None]
            work[..., k:stop] -= error[..., None] * factor[:, None, k, k:stop]
            errors[..., k - start] = error
        work[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return codes


def descend(codes: Array, target: Array, hessian: Array, scale: Array, bits: int) -> Array:
    """Coordinate descent over the integer codes until no code changes, SWEEPS at most."""
    low, high = scales.limits(bits)
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
                new = np.clip(np.rint(codes[..., k] - step), low, high)
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
