"""AdaQuant (Hubara et al. 2020, arXiv 2006.10518): learn weights and scales through the rounding.

Adam moves a correction of each weight and the logarithm of each channel's scale; rounding passes
gradients straight through. The error is the exact mean over all calibration rows, by their second
moments. Of every output channel the best state seen stays, the bias takes the mean of the output.
Activations keep the grids that calibration gave them.
"""

from __future__ import annotations

import numpy as np

from edgepipe.quantization import scales
from edgepipe.quantization.gptq import Solution, centred, regularised, unit
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array
from edgepipe.quantization.reconstruction import target_weights
from edgepipe.quantization.scales import CodeRange

STEPS = 400
#: Learning rates of corrections, in codes, and of scales, in logarithms; both fall to zero.
CODE_RATE = 0.004
SCALE_RATE = 0.002


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
    codes, ratio = _descend(target / scale, hessian, span, kept)
    scale = (scale * ratio).astype(np.float32)
    return codes, scale, centred(codes * scale, gram)


def _descend(
    wanted: Array, hessian: Array, span: CodeRange, kept: Array | None
) -> tuple[Array, Array]:
    """Codes for ``wanted`` [groups, outputs, K], in units of its scale, and that scale's factor;
    codes are 0 where not ``kept``."""
    import torch

    aim, moments = torch.from_numpy(np.float32(wanted)), torch.from_numpy(hessian)
    stays = torch.ones_like(aim) if kept is None else torch.from_numpy(np.float32(kept))
    correction = torch.zeros_like(aim, requires_grad=True)
    logarithm = torch.zeros_like(aim[..., :1]).requires_grad_()
    groups = [{"params": [correction], "lr": CODE_RATE}, {"params": [logarithm], "lr": SCALE_RATE}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    least = torch.full_like(aim[..., :1], torch.inf)
    best_codes, best_ratio = torch.zeros_like(aim), torch.ones_like(least)
    for _ in range(STEPS):
        ratio = logarithm.exp()
        free = (aim + correction) * stays / ratio
        rounded = torch.clamp(free + (free.round() - free).detach(), span.low, span.high)
        error = rounded * ratio - aim
        each = ((error @ moments) * error).sum(-1, keepdim=True)
        with torch.no_grad():
            better = each < least
            least = torch.where(better, each, least)
            best_codes = torch.where(better, rounded.round(), best_codes)
            best_ratio = torch.where(better, ratio, best_ratio)
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
        schedule.step()
    return best_codes.numpy(), best_ratio.numpy()
