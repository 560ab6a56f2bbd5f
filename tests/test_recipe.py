"""Recipes: a written grammar, both ways."""

import pytest

from edgepipe.errors import UserError
from edgepipe.recipe import FORMATS, Recipe


@pytest.mark.parametrize("text", FORMATS)
def test_every_recipe_survives_a_round_trip(text: str) -> None:
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("text", ["", "fp33", "FP32", "fp32 ", "int8"])
def test_an_unknown_recipe_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.parse(text)
    assert f"'{text}'" in str(caught.value)
    assert "fp32" in str(caught.value)
