"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): rounding with the error carried over.

From second moments of the *quantized* input x, H = cov(x) with a ridge: codes column by column,
those of large variance first, the error of each carried over to those that follow through the
Cholesky factor of H^-1. The aim is the float weight itself, on the scale of least error weighted
with the diagonal of H; the bias takes the mean of the output.
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
#: Columns whose updates are gathered before they reach the rest of the matrix.
BLOCK = 64

Solution = tuple[Array, Array, Array]


def solve(weight: Array, gram: Gram, span: CodeRange, kept: Array | None = None) -> Solution:
    """Codes [groups, outputs, K], scales [groups, outputs, 1] and bias [groups, outputs].

    ``weight`` is the float matrix [groups, outputs, K]; where ``kept`` is False its codes are 0,
    and the others make up for it. Codes are floats holding integers.
    """
    hessian = regularised(gram)
    single = unit(hessian)
    scale = scales.least_error(weight, span, np.diagonal(single, axis1=1, axis2=2)[:, None, :])
    codes = Walk.of(single).round(weight, scale, span, kept)
    return codes, scale, centred(codes * scale, gram)


def centred(weight: Array, gram: Gram) -> Array:
    """The bias [groups, outputs] that gives the output of ``weight`` the wanted mean."""
    mean = np.einsum("gok,gk->go", weight.astype(np.float64), gram.mean_x)
    result: Array = gram.mean_y - mean
    return result


def unit(hessian: Array) -> Array:
    """The Hessian in float32 with a mean diagonal of 1: only its proportions matter."""
    spread = np.einsum("gkk->g", hessian) / hessian.shape[-1]
    result: Array = (hessian / spread[:, None, None]).astype(np.float32)
    return result


def ridge(gram: Gram, share: float) -> Array:
    """What is added to the Hessian's diagonal [groups, 1, 1]."""
    spread = np.einsum("gkk->g", gram.hessian) / gram.hessian.shape[-1]
    result: Array = np.where(spread > 0, share * spread, 1.0)[:, None, None]
    return result


def regularised(gram: Gram, share: float = RIDGE) -> Array:
    """Hessian with its ridge, float64 [groups, K, K]."""
    hessian = gram.hessian
    return hessian + ridge(gram, share) * np.eye(hessian.shape[-1])


def inverse_factor(hessian: Array) -> Array:
    """Upper Cholesky factor U of H^-1 = U'U [groups, K, K], as GPTQ walks it.

    With J the reversal of the columns, J H J = L L' gives U = (J L J)^-1: H is factored itself,
    never its inverse.
    """
    lower = np.linalg.cholesky(hessian[:, ::-1, ::-1])
    return np.ascontiguousarray(np.linalg.inv(lower[:, ::-1, ::-1]), np.float32)


@dataclass(frozen=True)
class Walk:
    """The columns of a Hessian in the order of rounding, and ``inverse_factor`` in that order."""

    order: Array
    factor: Array

    @classmethod
    def of(cls, hessian: Array) -> Walk:
        """Columns of large variance first: their errors find the most columns to make up for them
        (a tenth less squared error than the order of the weights, measured)."""
        order = np.argsort(-np.diagonal(hessian, axis1=1, axis2=2), axis=1, kind="stable")
        rows = np.take_along_axis(hessian, order[:, :, None], 1)
        ordered = np.take_along_axis(rows, order[:, None, :], 2)
        return cls(order[:, None, :], inverse_factor(ordered.astype(np.float64)))

    def round(
        self, target: Array, scale: Array, span: CodeRange, kept: Array | None = None
    ) -> Array:
        """Codes for ``target`` [groups, outputs, K]; ``scale`` [groups, outputs, 1 or K].

        Codes are 0 where ``kept`` is False, which is an error that others make up for.
        """
        work = np.take_along_axis(target, self.order, 2)
        every = np.take_along_axis(np.broadcast_to(scale, target.shape), self.order, 2)
        codes = np.empty_like(target)
        stays = None
        if kept is not None:
            stays = np.take_along_axis(kept, np.broadcast_to(self.order, kept.shape), 2)
        rounded = _round_columns(work, self.factor, every, span, stays)
        np.put_along_axis(codes, self.order, rounded, 2)
        return codes


def _round_columns(
    work: Array, factor: Array, scale: Array, span: CodeRange, kept: Array | None
) -> Array:
    """Codes for ``work``, which is used up, by error feedback from the first column to the last."""
    size = work.shape[-1]
    codes = np.empty_like(work)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = np.empty_like(work[..., start:stop])
        for k in range(start, stop):
            codes[..., k] = np.clip(np.rint(work[..., k] / scale[..., k]), span.low, span.high)
            if kept is not None:
                codes[..., k] *= kept[..., k]
            error = (work[..., k] - codes[..., k] * scale[..., k]) / factor[:, k, k, None]
            work[..., k:stop] -= error[..., None] * factor[:, None, k, k:stop]
            errors[..., k - start] = error
        work[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return codes
