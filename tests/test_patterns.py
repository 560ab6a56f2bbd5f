"""Expressions of strangers: refused when they are none, and ended when they would not end."""

from __future__ import annotations

import pytest

from edgepipe import patterns
from edgepipe.errors import UserError


def test_an_expression_fits_the_whole_name() -> None:
    patterns.check("layer[12]", "override 1")
    assert patterns.fits("layer[12]", "layer1")
    assert not patterns.fits("layer[12]", "layer12")
    assert patterns.fits("(?!stem).*", "layer1")
    assert not patterns.fits("(?!stem).*", "stem.conv")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("[", "'[' is no regular expression"),
        ("a{2}{3}", "is no regular expression"),
        ("a" * 1001, "an expression of 1001 characters; at most 1000"),
    ],
)
def test_what_is_none_is_refused(pattern: str, said: str) -> None:
    with pytest.raises(UserError, match="override 1: ") as caught:
        patterns.check(pattern, "override 1")
    assert said in str(caught.value)


def test_an_expression_that_would_take_years(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_LIMIT_S", 0.05)
    with pytest.raises(UserError, match="takes longer than"):
        patterns.fits("(?:(?:a{1,500}){1,500}){1,500}b", "a" * 50)
