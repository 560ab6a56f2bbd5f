"""The vector math functions against float64 over their whole range."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import MapOp
from tests.kernels.harness import Kernels


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    count = 1 << 16
    layout = Blocked(1, 16, 1, count // 16, 16)
    from tests.kernels.harness import target_with

    names = ["sigmoid", "tanh", "elu", "gelu"]
    ops = [MapOp(layout, layout, (Step(n, (1.0,) if n == "elu" else ()),)) for n in names]
    kernels = Kernels(ops, target_with(16, 32), tmp_path_factory.mktemp("math"))

    def call(name: str, x: np.ndarray) -> np.ndarray:
        padded = np.resize(x.astype(np.float32), count)
        return kernels.run(names.index(name), [padded], [], [], count)[: x.size]

    return call


GRID = np.concatenate([np.linspace(-110, 110, 40001), np.linspace(-2, 2, 20001), [0.0, -0.0]])


def _units(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest error in units of the last place of the float32 result."""
    spacing = np.spacing(np.abs(expected).astype(np.float32).clip(1e-37)).astype(np.float64)
    return float(np.max(np.abs(got - expected) / spacing))


def test_sigmoid(functions) -> None:  # type: ignore[no-untyped-def]
    x = GRID.astype(np.float32).astype(np.float64)
    x = x[x > -86]  # below, the result is denormal
    assert _units(functions("sigmoid", x), 1 / (1 + np.exp(-x))) < 4


def test_tanh(functions) -> None:  # type: ignore[no-untyped-def]
    x = GRID.astype(np.float32).astype(np.float64)
    assert _units(functions("tanh", x), np.tanh(x)) < 4


def test_exp_through_elu_reaches_its_limits(functions) -> None:  # type: ignore[no-untyped-def]
    x = GRID[GRID < -1].astype(np.float32).astype(np.float64)
    assert _units(functions("elu", x), np.expm1(x)) < 4


def test_erf_through_gelu(functions) -> None:  # type: ignore[no-untyped-def]
    x = GRID[np.abs(GRID) < 5].astype(np.float32).astype(np.float64)
    expected = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    assert np.max(np.abs(functions("gelu", x) - expected)) < 1e-6


def test_infinities_and_nan(functions) -> None:  # type: ignore[no-untyped-def]
    x = np.array([np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(functions("sigmoid", x), [1, 0, np.nan])
    np.testing.assert_array_equal(functions("tanh", x), [1, -1, np.nan])
