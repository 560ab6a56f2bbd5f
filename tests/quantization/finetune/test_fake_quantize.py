"""Rounding that gradients pass through: the codes of ``Grid``, the gradients of the paper."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.quantization.observers import Grid, GridStyle
from edgepipe.quantization.scales import CodeRange
from edgepipe.quantization.weights import LayerWeights

torch = pytest.importorskip("torch")

from edgepipe.quantization.finetune.fake_quantize import (  # noqa: E402
    ActivationGrid,
    WeightGrid,
    round_to_grid,
)

pytestmark = pytest.mark.needs_torch

STYLES = [GridStyle(bits, signed) for bits in (4, 8) for signed in (False, True)]


def values(seed: int, count: int = 4096) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(count) * generator.choice([0.1, 1, 5], count)).astype(
        np.float32
    )


@pytest.mark.parametrize("style", STYLES)
def test_rounds_as_the_grid_does(style: GridStyle) -> None:
    start = style.grid(-0.7, 2.3)
    x = values(0)
    # Ties, which go to even.
    x[:32] = (np.arange(32, dtype=np.float32) - 16.5) * start.scale
    module = ActivationGrid(start, style, learned=True)
    assert module.grid == start
    found = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_array_equal(found, start.round(x))


def test_another_zero_point_shows() -> None:
    """Positive control."""
    start = STYLES[0].grid(-0.7, 2.3)
    other = Grid(start.scale, start.zero_point + 1, start.low, start.high)
    found = ActivationGrid(start, STYLES[0], True)(torch.from_numpy(values(0))).detach().numpy()
    assert not np.array_equal(found, other.round(values(0)))


def test_gradients_are_those_of_lsq() -> None:
    x = torch.tensor([-9.0, -0.6, 0.2, 1.26, 40.0], requires_grad=True)
    step = torch.tensor(0.5, requires_grad=True)
    low, high = -4, 7
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (round_to_grid(x, step, low, high) * upstream).sum().backward()
    np.testing.assert_array_equal(x.grad, [0.0, 2.0, 3.0, 4.0, 0.0])
    # Esser et al. 2020, eq. 3: q outside, round(x/s) - x/s inside.
    ratios = np.array([-0.6, 0.2, 1.26]) / 0.5
    inside = (np.rint(ratios) - ratios) @ [2.0, 3.0, 4.0]
    assert float(step.grad) == pytest.approx(-4 * 1.0 + 7 * 5.0 + inside, rel=1e-5)


def test_step_gradient_is_the_slope_on_average() -> None:
    """The gradient of the squared error by the step agrees with differences of that error."""
    x = torch.from_numpy(values(1, 1 << 18))

    def error(step: torch.Tensor) -> torch.Tensor:
        return (round_to_grid(x, step, -8, 7) - x).square().mean()

    step = torch.tensor(0.3, requires_grad=True)
    error(step).backward()
    slope = float(error(torch.tensor(0.303)) - error(torch.tensor(0.297))) / 0.006
    assert float(step.grad) == pytest.approx(slope, rel=0.02)


def test_steps_per_channel() -> None:
    x = torch.from_numpy(values(2, 24)).reshape(2, 3, 4).requires_grad_()
    step = torch.tensor([0.1, 0.2, 0.4]).reshape(1, 3, 1).requires_grad_()
    round_to_grid(x, step, -8, 7).sum().backward()
    for channel in range(3):
        alone = step.detach()[0, channel, 0].clone().requires_grad_()
        round_to_grid(x.detach()[:, channel], alone, -8, 7).sum().backward()
        torch.testing.assert_close(step.grad[0, channel, 0], alone.grad)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_averages_follow_the_extremes(style: GridStyle) -> None:
    module = ActivationGrid(style.grid(-1.0, 1.0), style, learned=False)
    x = torch.from_numpy(values(3))
    for _ in range(400):
        module(x)
    wanted = style.grid(float(x.min()), float(x.max()))
    assert module.grid.scale == pytest.approx(wanted.scale, rel=1e-4)
    assert module.grid.zero_point == wanted.zero_point
    module.eval()
    module(x * 100)
    assert module.grid.scale == pytest.approx(wanted.scale, rel=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_start_at_the_fitted_codes(bits: int) -> None:
    generator = np.random.default_rng(4)
    span = CodeRange.of(bits)
    codes = generator.integers(span.low, span.high + 1, (3, 2, 3, 3)).astype(np.int8)
    scale = np.array([0.1, 0.02, 3.0], np.float32)
    start = LayerWeights(codes, scale, bits, 0, None, np.zeros(3, np.float32))
    grid = WeightGrid(start, span, learned=True)
    weight = torch.from_numpy(start.float_weight() + values(5, codes.size).reshape(codes.shape))
    begun = grid.near(weight, torch.tensor(codes, dtype=torch.float32))
    np.testing.assert_array_equal(grid(begun).detach().numpy(), start.float_weight())
    assert not torch.equal(begun, grid(begun)), "what rounding took is kept"
