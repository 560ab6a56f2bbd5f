"""Closed-form reconstruction of a layer: the integers whose output is nearest to the float one.

Linear algebra only, from second moments of the *quantized* input x and the float output y:
1. Target weights by least squares, W* = (C + λ W) (H + λ I)^-1 with H = cov(x), C = cov(y, x).
   The fewer bits, the smaller λ.
2. Scales by search, errors weighted with the diagonal of H.
3. Codes by GPTQ (Frantar et al. 2022) against W*: column by column, the error of each carried
   over to those that follow through the Cholesky factor of H^-1.
4. Coordinate descent on the codes, (q s − W*) H (q s − W*)' never growing, alternating with
   the least-squares scale for fixed codes.
5. The bias takes the mean of the output.
6. Where a Relu or Clip follows, steps 1 to 5 again with an aim that leaves alone what the
   activation cuts off anyway; per output channel, the better result behind the activation stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepipe.quantization import scales
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array
from edgepipe.quantization.scales import CodeRange

#: Ridge of the rounding problem, as a share of the mean of the Hessian's diagonal.
RIDGE = 0.05
#: The same for the target weights, by bits, towards the float ones. 8-bit weights lose little
#: themselves, and what follows the calibration images in them does not carry over to others
#: (measured at ridges from 0.0001 to 10: best at 10 for 8 bits, at 0.05 to 0.3 for 4).
TARGET_RIDGE = {4: 0.2, 8: 10.0}
SWEEPS = 3
ALTERNATIONS = 3
#: Repetitions of step 6.
REFITS = 1
#: Columns whose updates are gathered before they reach the rest of the matrix.
BLOCK = 64


@dataclass(frozen=True)
class Rows:
    """What a layer sees and should give: ``x`` [groups, rows, K], the sum that its activation
    reads ``wanted`` [groups, rows, outputs], and what is added to the layer's output on the way
    (``added``, the quantized residual, or None). The activation keeps ``low`` … ``high``."""

    x: Array
    wanted: Array
    added: Array | None
    low: float
    high: float

    def attainable(self, output: Array) -> Array:
        """The layer output to aim at, given the present one.

        Where the activation cuts the wanted value off, anything beyond the bound is as good: the
        present output stays the aim if it is beyond too (majorisation of the error behind it).
        """
        total = output if self.added is None else output + self.added
        aim = np.where(self.wanted <= self.low, np.minimum(total, self.low), self.wanted)
        aim = np.where(self.wanted >= self.high, np.maximum(total, self.high), aim)
        return aim if self.added is None else aim - self.added

    def error(self, output: Array) -> Array:
        """Squared error behind the activation, summed over rows [groups, outputs], float64."""
        total = output if self.added is None else output + self.added
        difference = np.clip(total, self.low, self.high) - np.clip(self.wanted, self.low, self.high)
        result: Array = np.einsum("gro,gro->go", difference, difference, dtype=np.float64)
        return result


Solution = tuple[Array, Array, Array]


def solve(weight: Array, gram: Gram, span: CodeRange, rows: Rows | None = None) -> Solution:
    """Codes [groups, outputs, K], scales [groups, outputs, 1] and bias [groups, outputs].

    ``weight`` is the float matrix [groups, outputs, K]. Codes are floats holding integers.
    ``rows`` lets the fit look behind the activation; without, it ends at the linear output.
    """
    hessian = regularised(gram)
    factor = inverse_factor(unit(hessian).astype(np.float64))
    best = _round(weight, gram, hessian, factor, span)
    if rows is None:
        return best
    output = _output(best, rows)
    error = rows.error(output)
    for _ in range(REFITS):
        aimed = gram.with_outputs(rows.x, rows.attainable(output))
        found = _round(weight, aimed, hessian, factor, span)
        output = _output(found, rows)
        new = rows.error(output)
        better = new < error
        if not better.any():
            break
        error = np.where(better, new, error)
        best = tuple(  # type: ignore[assignment]
            np.where(better[..., None] if a.ndim == 3 else better, a, b)
            for a, b in zip(found, best, strict=True)
        )
        output = _output(best, rows)
    return best


def _round(weight: Array, gram: Gram, hessian: Array, factor: Array, span: CodeRange) -> Solution:
    target = target_weights(weight, gram, span.bits)
    single = unit(hessian)
    diagonal = np.diagonal(single, axis1=1, axis2=2)[:, None, :]
    scale = scales.least_error(target, span, diagonal)
    codes = gptq(target, factor, scale, span)
    for _ in range(ALTERNATIONS):
        codes = descend(codes, target, single, scale, span)
        scale = best_scale(codes, target, single, scale)
    mean = np.einsum("gok,gk->go", (codes * scale).astype(np.float64), gram.mean_x)
    return codes, scale, gram.mean_y - mean


def unit(hessian: Array) -> Array:
    """The Hessian in float32 with a mean diagonal of 1: only its proportions matter."""
    spread = np.einsum("gkk->g", hessian) / hessian.shape[-1]
    result: Array = (hessian / spread[:, None, None]).astype(np.float32)
    return result


def _output(solution: Solution, rows: Rows) -> Array:
    codes, scale, bias = solution
    product = rows.x @ (codes * scale).astype(np.float32).transpose(0, 2, 1)
    return product + bias[:, None, :].astype(np.float32)


def ridge(gram: Gram, share: float) -> Array:
    """What is added to the Hessian's diagonal [groups, 1, 1]."""
    spread = np.einsum("gkk->g", gram.hessian) / gram.hessian.shape[-1]
    result: Array = np.where(spread > 0, share * spread, 1.0)[:, None, None]
    return result


def regularised(gram: Gram, share: float = RIDGE) -> Array:
    """Hessian with its ridge, float64 [groups, K, K]."""
    hessian = gram.hessian
    return hessian + ridge(gram, share) * np.eye(hessian.shape[-1])


def target_weights(weight: Array, gram: Gram, bits: int) -> Array:
    """Least-squares weights, pulled towards the float ones by the ridge; float32."""
    share = TARGET_RIDGE[bits]
    hessian = regularised(gram, share)
    right = gram.cross + ridge(gram, share) * weight
    target = np.linalg.solve(hessian, right.transpose(0, 2, 1)).transpose(0, 2, 1)
    return np.ascontiguousarray(target, np.float32)


def inverse_factor(hessian: Array) -> Array:
    """Upper Cholesky factor U of H^-1 = U'U [groups, K, K], as GPTQ walks it.

    With J the reversal of the columns, J H J = L L' gives U = (J L J)^-1: H is factored itself,
    never its inverse.
    """
    lower = np.linalg.cholesky(hessian[:, ::-1, ::-1])
    return np.ascontiguousarray(np.linalg.inv(lower[:, ::-1, ::-1]), np.float32)


def gptq(target: Array, factor: Array, scale: Array, span: CodeRange) -> Array:
    """Codes for ``target`` by error feedback; ``scale`` [groups, outputs, 1 or K].

    ``factor`` is ``inverse_factor`` of the Hessian.
    """
    size = target.shape[-1]
    every = np.broadcast_to(scale, target.shape)
    work, codes = target.copy(), np.empty_like(target)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = np.empty_like(work[..., start:stop])
        for k in range(start, stop):
            codes[..., k] = np.clip(np.rint(work[..., k] / every[..., k]), span.low, span.high)
            error = (work[..., k] - codes[..., k] * every[..., k]) / factor[:, k, k, None]
            work[..., k:stop] -= error[..., None] * factor[:, None, k, k:stop]
            errors[..., k - start] = error
        work[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return codes


def descend(codes: Array, target: Array, hessian: Array, scale: Array, span: CodeRange) -> Array:
    """Coordinate descent over the integer codes until no code changes, SWEEPS at most."""
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
