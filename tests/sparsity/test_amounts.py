"""Amounts by layer against their definitions."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.recipe import Recipe
from edgepipe.sparsity.amounts import erk, spend


def test_erk_keeps_the_total_and_favours_small_layers() -> None:
    shapes = [(16, 16, 3, 3), (64, 64, 3, 3), (32, 16, 1, 1), (128, 64)]
    percents = np.array(erk(shapes, 80.0))
    sizes = np.array([np.prod(s) for s in shapes])
    assert abs(float((percents * sizes).sum() / sizes.sum()) - 80) < 0.05
    density = 1 - percents / 100
    ratio = np.array([sum(s) for s in shapes]) / sizes
    free = density < 1
    scale = density[free] / ratio[free]
    assert free.any() and np.allclose(scale, scale[0], rtol=1e-2)
    assert (ratio[~free] >= 1 / scale[0] * 0.99).all()
    assert percents[1] == percents.max() and percents[2] < 20


def test_a_budget_is_spent_best() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        costs = np.sort(random.integers(1, 100, (4, 5)), axis=1)[:, ::-1].astype(float)
        distortions = np.sort(random.random((4, 5)), axis=1)
        budget = float(random.uniform(costs.min(1).sum(), costs.max(1).sum()))
        chosen = spend(distortions.tolist(), costs.tolist(), budget)
        assert chosen is not None
        taken = list(enumerate(chosen))
        assert sum(costs[i, o] for i, o in taken) <= budget + 1e-9
        best = min(
            sum(distortions[i, o] for i, o in enumerate(way))
            for way in product(range(5), repeat=4)
            if sum(costs[i, o] for i, o in enumerate(way)) <= 0.995 * budget
        )
        assert sum(distortions[i, o] for i, o in taken) <= best + 1e-9


def test_a_budget_below_the_cheapest_options_cannot_be_met() -> None:
    assert spend([[0.0, 1.0]], [[10.0, 5.0]], 4.0) is None
    assert spend([[0.0, 1.0]], [[10.0, 5.0]], 5.0) == [1]
    assert spend([[0.0, 1.0]], [[10.0, 5.0]], 10.0) == [0]


@pytest.mark.parametrize(
    ("line", "settings", "message"),
    [
        ("fp32+80%", {"amounts": "erkk"}, "unknown amounts"),
        ("fp32+2:4", {"amounts": "erk"}, "patterns S%"),
        ("fp32", {"amounts": "erk"}, "patterns S%"),
        ("fp32+c40%", {"amounts": "search"}, "patterns S%"),
        ("fp32+80%", {"budget": "macs"}, "search spends"),
        ("fp32+80%", {"amounts": "search", "budget": "time"}, "unknown budget"),
        ("w8a8+80%b1x4", {"amounts": "search", "budget": "latency"}, "estimated for fp32"),
        ("fp32+80%", {"amounts": "erk", "observer": "mse"}, "no further settings"),
    ],
)
def test_settings_that_do_not_go_together(
    line: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Recipe.read(line, settings)


def test_amounts_are_read_back() -> None:
    recipe = Recipe.read("fp32+80%", {"amounts": "search", "budget": "latency"})
    assert Recipe.read(str(recipe), recipe.settings.to_json()) == recipe
