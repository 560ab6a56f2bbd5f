"""Prunes weights in place of the graph: which go, and what the rest becomes.

With moments of a layer's input the rest is the least-squares solution that reproduces the dense
layer's output, and its bias keeps the output's mean; without them it stays as it is. Places are
chosen by the magnitude of weights, times the root mean square of their inputs where that is known
(Sun et al. 2023, "Wanda", arXiv 2306.11695); groups that share a pattern by their sum of squares.
With moments the places are then looked for again, as far as that brings the output nearer.
"""

from __future__ import annotations

import numpy as np

from edgepipe.sparsity.pattern import Pattern

#: Share of the mean of the Hessian's diagonal that is added to it.
DAMPING = 0.01
#: Of ``settled``: the first price, by what it grows where at least that share of the places has
#: changed since the last look, steps between two looks, and most steps.
PRICE, GROWTH, LOOK, MOST_STEPS = 0.1, ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1)), 3, 300


def mask(scores: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Which of the weights stay, bool ``[outputs, inputs, taps]`` as ``scores`` (≥ 0).

    N:M counts along inputs, tap by tap; a last group of fewer than M inputs, or of fewer than V
    outputs, keeps the same share, rounded up. Blocks are of inputs, tap by tap, by the sum of their
    scores; the last may be smaller. Of equal scores the first stay.
    """
    outputs, inputs, taps = scores.shape
    if not pattern.of:
        starts = np.arange(0, inputs, pattern.block)
        total = np.add.reduceat(scores, starts, axis=1)
        keep = max(1, round(pattern.density * total.size))
        order = np.argsort(-total.reshape(-1), kind="stable")
        flat = np.zeros(total.size, bool)
        flat[order[:keep]] = True
        return np.repeat(flat.reshape(total.shape), pattern.block, axis=1)[:, :inputs]
    groups, bands = -(-inputs // pattern.of), -(-outputs // pattern.shared)
    padded = np.full((bands * pattern.shared, groups * pattern.of, taps), -1.0)  # below any score
    padded[:outputs, :inputs] = scores
    padded[outputs:, :inputs] = 0.0
    total = padded.reshape(bands, pattern.shared, groups, pattern.of, taps).sum(1)
    rank = np.argsort(np.argsort(-total, axis=2, kind="stable"), axis=2, kind="stable")
    sizes = np.minimum(pattern.of, inputs - pattern.of * np.arange(groups))
    keep = -(-sizes * pattern.kept // pattern.of)
    found = (rank < keep[:, None, None]).reshape(bands, -1, taps)
    return np.repeat(found, pattern.shared, axis=0)[:outputs, :inputs]


class Spectrum:
    """Eigenvalues and vectors of a ``refit``'s equations, inputs in units of their deviations."""

    def __init__(self, hessian: np.ndarray) -> None:
        damped = _damped(hessian)
        self.unit = 1 / np.sqrt(np.diagonal(damped))
        self.values, self.vectors = np.linalg.eigh(damped * self.unit * self.unit[:, None])


def settled(
    kept: np.ndarray, pattern: Pattern, weight: np.ndarray, hessian: np.ndarray, cross: np.ndarray,
    spectrum: Spectrum | None = None,
) -> np.ndarray:  # fmt: skip
    """Places of ``pattern`` whose weights come nearer to the dense layer's output than those of
    ``kept`` (bool ``[outputs, inputs, taps]``), in its form.

    The other arguments are those of ``refit``, and the ``Spectrum`` of ``hessian`` where it is
    known. Alternating directions (ADMM; Boyd et al. 2011) over two sets of weights, which are to
    become one: those of least squares, and the largest places of ``pattern`` in them. The price of
    their difference grows, the slower the fewer places change, until none does (Meng et al. 2024,
    "ALPS", arXiv 2406.07831). A weight is as large as what it does to the output: inputs count in
    units of their deviation.
    """
    found = kept.reshape(len(kept), -1)
    known = Spectrum(hessian) if spectrum is None else spectrum
    values, vectors = known.values, known.vectors
    wanted = _wanted(weight, hessian, cross) * known.unit @ vectors
    price, places = PRICE, int(found.sum())
    sparse = np.where(found, (wanted / values) @ vectors.T, 0.0)
    dual = np.zeros_like(sparse)
    for step in range(1, MOST_STEPS + 1):
        dense = ((wanted + (price * sparse - dual) @ vectors) / (values + price)) @ vectors.T
        sparse = dense + dual / price
        largest = mask(np.square(sparse).reshape(kept.shape), pattern).reshape(found.shape)
        sparse *= largest
        dual += price * (dense - sparse)
        if step % LOOK == 0:
            changed = int((largest & ~found).sum())
            found = largest
            if not changed:
                break
            price *= next(growth for share, growth in GROWTH if changed >= share * places)
    return found.reshape(kept.shape)


def _damping(hessian: np.ndarray) -> float:
    """What draws weights a little towards those that were."""
    return DAMPING * max(float(np.trace(hessian)) / len(hessian), 1e-12)


def _damped(hessian: np.ndarray) -> np.ndarray:
    """The left side of the equations that weights solve."""
    return hessian + _damping(hessian) * np.eye(len(hessian))


def _wanted(weight: np.ndarray, hessian: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """The right side."""
    wanted: np.ndarray = cross + _damping(hessian) * weight.astype(np.float64)
    return wanted


def refit(
    weight: np.ndarray, kept: np.ndarray, hessian: np.ndarray, cross: np.ndarray
) -> np.ndarray:
    """Weights ``[outputs, K]`` at the places ``kept`` whose output is nearest to the dense one's.

    ``hessian[K, K]`` is the covariance of the inputs, ``cross[outputs, K]`` that of the wanted
    outputs with them. Outputs with one pattern share a solution.
    """
    damped, wanted = _damped(hessian), _wanted(weight, hessian, cross)
    result = np.zeros(weight.shape)
    patterns, owner = np.unique(kept, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        places, rows = np.flatnonzero(pattern), np.flatnonzero(owner.reshape(-1) == number)
        if len(places):
            solved = np.linalg.solve(damped[np.ix_(places, places)], wanted[np.ix_(rows, places)].T)
            result[np.ix_(rows, places)] = solved.T
    return result.astype(np.float32)
