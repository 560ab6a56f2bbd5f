"""Prunes weights in place of the graph: which go, and what the rest becomes.

With moments of a layer's input the rest is the least-squares solution that reproduces the dense
layer's output, and its bias keeps the output's mean; without them it stays as it is. Places are
chosen by the magnitude of weights, times the root mean square of their inputs where that is known
(Sun et al. 2023, "Wanda", arXiv 2306.11695); groups that share a pattern by their sum of squares.
Those of N:M then change places for others in their groups, as far as that brings the output nearer.
"""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from edgepipe.sparsity.pattern import Pattern

#: Share of the mean of the Hessian's diagonal that is added to it.
DAMPING = 0.01
#: How often ``exchanged`` looks at every group, at most, and how many choices of one it compares.
SWEEPS, MOST_CHOICES = 4, 100


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


def exchanged(
    kept: np.ndarray, pattern: Pattern, weight: np.ndarray, hessian: np.ndarray, cross: np.ndarray
) -> np.ndarray:
    """Places of ``pattern``, an N:M, whose weights come nearer to the dense layer's output than
    those of ``kept`` (bool ``[outputs, inputs, taps]``), in its form.

    The other arguments are those of ``refit``. Block coordinate descent over places and weights
    together: of every group what is best beside all the others as they are. Patterns of more than
    ``MOST_CHOICES`` to a group stay as they are.
    """
    outputs, inputs, taps = kept.shape
    if comb(pattern.of, pattern.kept) > MOST_CHOICES:
        return kept
    damped, wanted = _damped(weight, hessian, cross)
    rows = np.arange(outputs)
    band = rows // pattern.shared
    found = kept.reshape(outputs, -1).copy()
    values = np.where(found, weight, 0.0).astype(np.float64)
    rest = wanted - values @ damped
    for _ in range(SWEEPS):
        changed = False
        for first in range(0, inputs, pattern.of):
            for tap in range(taps):
                group = np.arange(first, min(first + pattern.of, inputs)) * taps + tap
                keep = int(found[0, group].sum())
                own = damped[np.ix_(group, group)]
                target = rest[:, group] + values[:, group] @ own
                choices = np.array(list(combinations(range(len(group)), keep)))
                inverses = np.linalg.inv(own[choices[:, :, None], choices[:, None, :]])
                parts = target[:, choices]  # [outputs, choices, keep]
                solved = np.einsum("ock,ckl->ocl", parts, inverses)
                gains = np.zeros((band[-1] + 1, len(choices)))
                np.add.at(gains, band, np.einsum("ock,ock->oc", parts, solved))
                best = gains.argmax(1)[band]
                places = rows[:, None], choices[best]
                new = np.zeros((outputs, len(group)))
                new[places] = solved[rows, best]
                stays = np.zeros(new.shape, bool)
                stays[places] = True
                changed |= bool((stays != found[:, group]).any())
                rest -= (new - values[:, group]) @ damped[group]
                values[:, group], found[:, group] = new, stays
        if not changed:
            break
    return found.reshape(kept.shape)


def _damped(
    weight: np.ndarray, hessian: np.ndarray, cross: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of the equations that weights solve, drawn a little towards those that were."""
    size = len(hessian)
    damping = DAMPING * max(float(np.trace(hessian)) / size, 1e-12)
    return hessian + damping * np.eye(size), cross + damping * weight.astype(np.float64)


def refit(
    weight: np.ndarray, kept: np.ndarray, hessian: np.ndarray, cross: np.ndarray
) -> np.ndarray:
    """Weights ``[outputs, K]`` at the places ``kept`` whose output is nearest to the dense one's.

    ``hessian[K, K]`` is the covariance of the inputs, ``cross[outputs, K]`` that of the wanted
    outputs with them. Outputs with one pattern share a solution.
    """
    damped, wanted = _damped(weight, hessian, cross)
    result = np.zeros(weight.shape)
    patterns, owner = np.unique(kept, axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        places, rows = np.flatnonzero(pattern), np.flatnonzero(owner.reshape(-1) == number)
        if len(places):
            solved = np.linalg.solve(damped[np.ix_(places, places)], wanted[np.ix_(rows, places)].T)
            result[np.ix_(rows, places)] = solved.T
    return result.astype(np.float32)
