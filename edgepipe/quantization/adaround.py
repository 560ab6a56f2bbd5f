"""AdaRound (Nagel et al. 2020, arXiv 2004.10568): learn which way every weight is rounded.

Each code is the floor plus h(V) in 0 … 1, a stretched sigmoid of a free variable. Adam minimises
the output error plus a penalty that pushes h to 0 or 1. The error is the exact mean over all
calibration rows, by their second moments, where the paper samples batches; the aim are the
least-squares weights, as for ``reconstruction``. Scales stay as the search found them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgepipe.quantization import scales
from edgepipe.quantization.gptq import Solution, centred, regularised, unit
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array
from edgepipe.quantization.reconstruction import target_weights
from edgepipe.quantization.scales import CodeRange

if TYPE_CHECKING:
    import torch

STEPS = 400
RATE = 0.05
#: The sigmoid is stretched to this range and cut to 0 … 1, so that it reaches both.
STRETCH = (-0.1, 1.1)
#: Weight of the penalty against a squared error in codes.
PENALTY = 1.0
#: Share of the steps without penalty, and its exponent from first to last.
WARM_UP = 0.2
SHARPNESS = (20.0, 2.0)


def solve(weight: Array, gram: Gram, span: CodeRange, kept: Array | None = None) -> Solution:
    """Codes [groups, outputs, K], scales [groups, outputs, 1] and bias [groups, outputs].

    ``weight`` is the float matrix [groups, outputs, K]; where ``kept`` is False its codes are 0.
    Needs torch.
    """
    hessian = unit(regularised(gram))
    target = target_weights(weight, gram, span.bits)
    if kept is not None:  # pruning has fitted what stays
        target = np.ascontiguousarray(weight, np.float32)
    scale = scales.least_error(target, span, np.diagonal(hessian, axis1=1, axis2=2)[:, None, :])
    codes = _round(target / scale, hessian, span, kept)
    return codes, scale, centred(codes * scale, gram)


def _round(wanted: Array, hessian: Array, span: CodeRange, kept: Array | None) -> Array:
    """Integers near ``wanted`` [groups, outputs, K] with d H d' small, 0 where not ``kept``."""
    import torch

    aim, moments = torch.from_numpy(np.float32(wanted)), torch.from_numpy(hessian)
    floor = torch.floor(aim)
    stays = torch.ones_like(aim) if kept is None else torch.from_numpy(np.float32(kept))
    free = _inverse(aim - floor).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=RATE)
    warm = int(WARM_UP * STEPS)
    for step in range(STEPS):
        share = _share(free)
        error = torch.clamp(floor + share, span.low, span.high) * stays - aim
        loss = ((error @ moments) * error).sum()
        if step >= warm:
            progress = (step - warm) / (STEPS - warm)
            sharpness = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * progress
            loss = loss + PENALTY * (1 - (2 * share - 1).abs().pow(sharpness)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    codes = torch.clamp(floor + (_share(free.detach()) >= 0.5), span.low, span.high)
    result: Array = (codes * stays).numpy()
    return result


def _share(free: torch.Tensor) -> torch.Tensor:
    """h(V): how much of a code is added to the floor."""
    low, high = STRETCH
    return (free.sigmoid() * (high - low) + low).clamp(0.0, 1.0)


def _inverse(share: torch.Tensor) -> torch.Tensor:
    """V for a share of 0 … 1."""
    low, high = STRETCH
    return ((share - low) / (high - low)).logit()
