"""How much of each layer is pruned, so that the network as a whole reaches an amount."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Parts that a budget is divided into by ``spend``.
BINS = 2000


def erk(shapes: Sequence[tuple[int, ...]], percent: float) -> list[float]:
    """Per cent of zeros for weights of ``shapes`` (outputs, inputs, taps …) that are ``percent`` of
    all: densities go with the sum of a shape's extents over their product, 1 at most (Erdős–Rényi
    kernels; Evci et al. 2020, "RigL", arXiv 1911.11134)."""
    sizes = np.array([np.prod(shape) for shape in shapes], float)
    ratio = np.array([sum(shape) for shape in shapes]) / sizes
    wanted, low, high = (1 - percent / 100) * sizes.sum(), 0.0, 1 / float(ratio.min())
    for _ in range(60):  # what all densities hold together grows with the factor
        middle = (low + high) / 2
        held = float((np.minimum(1.0, middle * ratio) * sizes).sum())
        low, high = (middle, high) if held < wanted else (low, middle)
    return [round(100 * (1 - min(1.0, high * float(r))), 2) for r in ratio]


def spend(
    distortions: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], budget: float
) -> list[int] | None:
    """The option of each layer so that costs sum up to ``budget`` at most and distortions to as
    little as can be; None where even the cheapest options cost more.

    Dynamic programming over layers and spent parts of the budget (as in Xu et al. 2023, "Efficient
    Joint Optimization of Layer-Adaptive Weight Pruning", arXiv 2308.10438). Costs are rounded up
    to parts of the budget above what the cheapest options cost, so the result never exceeds it.
    """
    floors = [min(layer) for layer in costs]
    spare = budget - sum(floors)
    if spare < -1e-9 * max(budget, 1.0):
        return None
    unit = max(spare, 0.0) / BINS
    best = np.zeros(BINS + 1)
    taken = np.zeros((len(costs), BINS + 1), np.int64)
    for layer, (found, prices) in enumerate(zip(distortions, costs, strict=True)):
        table = np.full((len(prices), BINS + 1), np.inf)
        for option, (distortion, price) in enumerate(zip(found, prices, strict=True)):
            parts = _parts(price - floors[layer], unit)
            if parts <= BINS:
                table[option, parts:] = best[: BINS + 1 - parts] + distortion
        taken[layer], best = table.argmin(0), table.min(0)
    left, chosen = BINS, [0] * len(costs)
    for layer in reversed(range(len(costs))):
        chosen[layer] = int(taken[layer, left])
        left -= _parts(costs[layer][chosen[layer]] - floors[layer], unit)
    return chosen


def _parts(price: float, unit: float) -> int:
    if price <= 0:
        return 0
    return int(np.ceil(price / unit - 1e-9)) if unit else BINS + 1
