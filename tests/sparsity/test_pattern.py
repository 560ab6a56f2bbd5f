"""Patterns as text, masks, and the refit against its definition."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.recipe import Recipe
from edgepipe.sparsity.pattern import Pattern
from edgepipe.sparsity.pruning import mask, refit, settled


@pytest.mark.parametrize(
    "text", ["2:4", "1:8", "4:8v16", "1:4v32", "80%", "62.5%", "80%b1x4", "c40%", "auto60%"]
)
def test_a_pattern_is_read_back(text: str) -> None:
    pattern = Pattern.parse(text, "here")
    assert str(pattern) == text and Pattern.parse(str(pattern), "here") == pattern
    recipe = Recipe.parse(f"fp32+{text}")
    assert str(recipe) == f"fp32+{text}" and Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4:2",
        "4:4",
        "0:4",
        "2:4v0",
        "2:4v65",
        "100%",
        "0%",
        "x",
        "80%b1x3",
        "2:4b1x4",
        "c",
        "c40",
        "c40%b1x4",
    ],
)
def test_an_impossible_pattern_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^--recipe: .*(known: N:M|N is below M)"):
        Recipe.parse(f"fp32+{text}")


@pytest.mark.parametrize("format", ["fp32", "fp16", "w8a8", "w4a8", "w8a16", "w4g32"])
def test_every_format_takes_fewer_channels(format: str) -> None:
    assert str(Recipe.parse(f"{format}+c40%")) == f"{format}+c40%"


@pytest.mark.parametrize("format", ["w8a16", "fp16", "w4g32"])
def test_a_format_without_sparse_kernels_is_refused(format: str) -> None:
    with pytest.raises(UserError, match=r"use fp32\+2:4, or leave '\+2:4' out"):
        Recipe.parse(f"{format}+2:4")


def test_auto_says_how_much() -> None:
    assert str(Recipe.parse("fp32+auto")) == "fp32+auto50%"
    with pytest.raises(UserError, match=r"use w8a8\+50%b1x4, or fp32\+auto50%$"):
        Recipe.parse("w8a8+auto")


def test_integers_are_sparse_by_blocks() -> None:
    assert str(Recipe.parse("w8a8+80%b1x4").sparsity) == "80%b1x4"
    with pytest.raises(UserError, match=r"use w8a8\+50%b1x4, or fp32\+2:4$"):
        Recipe.parse("w8a8+2:4")


def test_blocks_stay_or_go_as_a_whole() -> None:
    scores = np.random.default_rng(4).random((6, 10, 3))
    kept = mask(scores, Pattern.parse("80%b1x4", ""))
    sums = np.stack([scores[:, s : s + 4].sum(1) for s in (0, 4, 8)], 1)
    stays = np.stack([kept[:, s : s + 4].all(1) for s in (0, 4, 8)], 1)
    goes = np.stack([~kept[:, s : s + 4].any(1) for s in (0, 4, 8)], 1)
    assert (stays ^ goes).all() and stays.sum() == round(0.2 * sums.size)
    assert sums[stays].min() > sums[goes].max()


def test_of_every_group_the_largest_stay() -> None:
    scores = np.random.default_rng(0).random((6, 10, 3))
    kept = mask(scores, Pattern.parse("2:4", ""))
    for channel, tap in np.ndindex(6, 3):
        for start, size in ((0, 2), (4, 2), (8, 1)):  # of the last two inputs one, the same share
            group = scores[channel, start : start + 4, tap]
            chosen = set(np.flatnonzero(kept[channel, start : start + 4, tap]))
            assert chosen == set(np.argsort(-group)[:size])


def test_channels_share_a_pattern() -> None:
    scores = np.random.default_rng(1).random((7, 8, 1))
    kept = mask(scores, Pattern.parse("1:4v3", ""))
    assert (kept[0:3] == kept[0]).all() and (kept[3:6] == kept[3]).all()
    assert kept.sum() == 7 * 2
    first = scores[:3, :4, 0].sum(0)
    assert np.flatnonzero(kept[0, :4, 0]) == [int(np.argmax(first))]


def test_a_share_of_all_weights_stays_but_one_at_least() -> None:
    scores = np.random.default_rng(2).random((4, 25, 1))
    kept = mask(scores, Pattern.parse("80%", ""))
    assert kept.sum() == 20 and scores[kept].min() > scores[~kept].max()
    assert mask(np.ones((1, 2, 1)), Pattern.parse("99%", "")).sum() == 1


def test_the_refit_is_the_least_squares_solution() -> None:
    """Against numpy's solver on the rows themselves; nothing else comes as near."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((500, 12)) @ rng.standard_normal((12, 12))
    weight = rng.standard_normal((5, 12)).astype(np.float32)
    kept = mask(weight[:, :, None] ** 2, Pattern.parse("2:4", ""))[..., 0]
    hessian = x.T @ x / 500
    found = refit(weight, kept, hessian, weight @ hessian)
    assert (found[~kept] == 0).all()
    y = x @ weight.T
    for row in range(5):
        exact = np.linalg.lstsq(x[:, kept[row]], y[:, row], rcond=None)[0]
        best = np.square(x[:, kept[row]] @ exact - y[:, row]).sum()
        error = np.square(x @ found[row] - y[:, row]).sum()
        plain = np.square(x @ np.where(kept[row], weight[row], 0) - y[:, row]).sum()
        assert best <= error < 1.01 * best < plain


def problem(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [outputs, K], a covariance of inputs that go together, and the outputs' with them."""
    rng, size = np.random.default_rng(seed), shape[1] * shape[2]
    inputs = rng.standard_normal((4 * size, size)) @ rng.standard_normal((size, size))
    hessian = inputs.T @ inputs / len(inputs)
    weight = rng.standard_normal((shape[0], size)).astype(np.float32)
    return weight, hessian, weight @ hessian


def error(kept: np.ndarray, weight: np.ndarray, hessian: np.ndarray, cross: np.ndarray) -> float:
    """Of the output, after the refit."""
    left = refit(weight, kept.reshape(len(kept), -1), hessian, cross) - weight
    return float(np.einsum("ok,kl,ol->", left, hessian, left))


@pytest.mark.parametrize(
    "text",
    ["2:4", "1:4", "1:8", "4:8", "8:16", "2:4v2", "1:4v8", "50%", "80%", "90%", "50%b1x4"],
)
@pytest.mark.parametrize("shape", [(8, 16, 1), (5, 10, 4)])
def test_settled_places_keep_the_pattern_and_lower_the_error(
    text: str, shape: tuple[int, int, int]
) -> None:
    pattern, before, after = Pattern.parse(text, ""), 0.0, 0.0
    for seed in range(5):
        weight, hessian, cross = problem(seed, shape)
        kept = mask(weight.reshape(shape) ** 2 * np.diagonal(hessian).reshape(shape[1:]), pattern)
        found = settled(kept, pattern, weight, hessian, cross)
        assert found.dtype == bool
        blocks = range(0, shape[1], pattern.of or pattern.block)
        parts = [slice(first, first + (pattern.of or pattern.block)) for first in blocks]
        if pattern.of:
            for part in parts:
                assert np.array_equal(found[:, part].sum(1), kept[:, part].sum(1))
            for band in range(0, shape[0], pattern.shared):
                assert (found[band : band + pattern.shared] == found[band]).all()
        else:
            counts = [sum(k[:, p].any(1).sum() for p in parts) for k in (kept, found)]
            assert counts[0] == counts[1]
            assert all((found[:, p] == found[:, p][:, :1]).all() for p in parts)
        before += error(kept, weight, hessian, cross)
        after += error(found, weight, hessian, cross)
    assert after < 0.9 * before


@pytest.mark.parametrize("text", ["80%", "1:4", "80%b1x4"])
def test_settled_places_where_inputs_have_nothing_to_do_with_each_other(text: str) -> None:
    """The largest weights are the best there: nothing is to be won, and little lost."""
    weight, pattern = problem(0, (16, 32, 1))[0], Pattern.parse(text, "")
    equations = weight, np.eye(32), weight.astype(np.float64)
    kept = mask(weight.reshape(16, 32, 1) ** 2, pattern)
    found = settled(kept, pattern, *equations)
    assert error(found, *equations) < 1.03 * error(kept, *equations)
