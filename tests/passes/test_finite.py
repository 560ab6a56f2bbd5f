"""Cases of edgepipe/passes/finite.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.passes import finite

from .rewriting import assert_equal, normal, rewrite

LINEAR = "g (float[2,3] x) => (float[2,4] y) <float[3,4] w, float[4] b> { y = Gemm(x, w, b) }"
SUM = "g (float[2,3] x) => (float[2,3] y) <float[3] c> { y = Add(x, c) }"


def wrong(size: tuple[int, ...], value: float) -> np.ndarray:
    array = normal(*size).copy()
    array.flat[1] = value
    return array


def test_1_nan_is_refused_anywhere() -> None:
    with pytest.raises(UserError, match=r"'c' is not finite: 1 of 3 values are NaN, 0 infinite"):
        rewrite(SUM, finite.run, c=wrong((3,), np.nan))
    with pytest.raises(UserError, match="constant 'w' is not finite: 1 of 12 values are NaN"):
        rewrite(LINEAR, finite.run, w=wrong((3, 4), np.nan), b=normal(4))


def test_2_infinities_are_refused_in_weights_alone() -> None:
    with pytest.raises(UserError, match="0 of 12 values are NaN, 1 infinite"):
        rewrite(LINEAR, finite.run, w=wrong((3, 4), np.inf), b=normal(4))
    rewrite(LINEAR, finite.run, w=normal(3, 4), b=wrong((4,), -np.inf))
    rewrite(SUM, finite.run, c=wrong((3,), -np.inf))


def test_large_numbers_are_finite() -> None:
    result = rewrite(SUM, finite.run, c=np.full(3, 3e38, np.float32))
    assert result.ops == ["Add"]
    assert_equal(result, "moves data only")
