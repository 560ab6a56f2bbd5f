"""Recipes: a written grammar, both ways, and the file that says more."""

from pathlib import Path

import pytest

from edgepipe.errors import UserError
from edgepipe.recipe import FORMATS, Override, Recipe, Settings

LINES = (*FORMATS, "w4g2", "w4g32", "w8g128", "w4g1024")


@pytest.mark.parametrize("text", LINES)
def test_every_recipe_survives_a_round_trip(text: str) -> None:
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize("text", ["", "fp33", "FP32", "fp32 ", "int8", "w8a8\n", "w8a4", "w4g032"])
def test_an_unknown_recipe_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match="unknown recipe") as caught:
        Recipe.parse(text)
    assert any(word in str(caught.value) for word in ("did you mean", "fp32"))


@pytest.mark.parametrize("text", ["w4g0", "w4g1", "w4g1025"])
def test_group_sizes_have_bounds(text: str) -> None:
    with pytest.raises(UserError, match=r"2…1024|unknown recipe"):
        Recipe.parse(text)


@pytest.mark.parametrize(
    ("text", "bits", "integer", "group", "family"),
    [
        ("fp16", None, False, None, "fp16"),
        ("w8a8", 8, True, None, "w8a8"),
        ("w4a4", 4, True, None, "w4a4"),
        ("w8a16", 8, False, None, "w8a16"),
        ("w4g32", 4, False, 32, "w4gN"),
    ],
)
def test_what_a_line_means(
    text: str, bits: int | None, integer: bool, group: int | None, family: str
) -> None:
    recipe = Recipe.parse(text)
    assert (recipe.weight_bits, recipe.integer) == (bits, integer)
    assert (recipe.group_size, recipe.family) == (group, family)


WHOLE = """
format = "w4a8"
first_last = "float"
depthwise = "same"
observer = "percentile"
percentile = 99.9
methods = ["equalization", "reconstruction"]
activations = "symmetric"
max_samples = 100
allow_float_fallback = true
overrides = [{match = "stem.*", format = "w8a8"}, {match = "Gemm", format = "float"}]
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_says_more(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, WHOLE))
    assert str(recipe) == "w4a8"
    assert recipe.settings == Settings(
        (Override("stem.*", "w8a8"), Override("Gemm", "float")), "float", "same", "percentile",
        99.9, ("equalization", "reconstruction"), "symmetric", 100, True,
    )  # fmt: skip
    assert Recipe.read(str(recipe), recipe.settings.to_json()) == recipe
    assert Recipe.load("w4a8") == Recipe("w4a8") != recipe


def test_settings_without_content_are_empty(tmp_path: Path) -> None:
    assert Recipe.load(write(tmp_path, 'format = "fp16"')) == Recipe("fp16")
    assert Settings().to_json() == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'format' is missing"),
        ("format = 8", "'format' is missing"),
        ('format = "w8a9"', "unknown recipe 'w8a9'"),
        ('format = "w8a8"\nobservr = "mse"', "did you mean 'observer'"),
        ('format = "w8a8"\npercentile = "high"', "'percentile' must be a number"),
        ('format = "w8a8"\nmax_samples = true', "'max_samples' must be a whole number"),
        ('format = "w8a8"\nallow_float_fallback = 1', "must be true or false"),
        ('format = "w8a8"\nmethods = [1]', "'methods' must be a list of names"),
        ('format = "w8a8"\nactivations = "odd"', "known: symmetric, asymmetric"),
        ('format = "w8a8"\noverrides = [{match = "["}]', "override 1: it must have"),
        (
            'format = "w8a8"\noverrides = [{match = "[", format = "float"}]',
            "override 1: '[' is no regular expression",
        ),
        (
            'format = "w8a8"\noverrides = [{match = "x", format = "w2a8"}]',
            "override 1: unknown recipe 'w2a8'",
        ),
        (
            'format = "w8a8"\noverrides = [{match = "x", format = "w8a16"}]',
            "'w8a16' does not combine with w8a8",
        ),
        (
            'format = "w4g32"\noverrides = [{match = "x", format = "w8a8"}]',
            "'w8a8' does not combine with w4g32",
        ),
        ('format = "fp32"\nobserver = "mse"', "fp32 has no further settings"),
        ("format = ", "not a readable TOML file"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        Recipe.load(write(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.toml: no such recipe file"):
        Recipe.load("nowhere.toml")
