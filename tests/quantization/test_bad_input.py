"""What cannot be quantized is refused by name; what is doubtful is noted by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgepipe import quantization
from edgepipe.errors import UserError
from edgepipe.quantization import QuantConfig, calibration
from quantization.networks import MIXED, build, context, quantize, run, samples

GOOD = {"x": np.zeros((1, 3, 12, 12), np.float32)}


def refusal(batch: list[dict[str, Any]], **weights: np.ndarray) -> str:
    with pytest.raises(UserError) as error:
        quantization.apply(build(MIXED, **weights), QuantConfig(), batch, context())
    return str(error.value)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([], ["no samples"]),
        ([{"y": GOOD["x"]}], ["'y'", "did you mean|known", "sample 0"]),
        ([{}], ["'x' is missing"]),
        ([GOOD, {"x": np.zeros((3, 12, 12), np.float32)}], ["sample 1", "[1, 3, 12, 12]"]),
        ([{"x": np.full((1, 3, 12, 12), np.nan, np.float32)}], ["'x'", "NaN"]),
        ([{"x": np.full((1, 3, 12, 12), np.inf, np.float32)}], ["'x'", "infinite"]),
        ([{"x": np.zeros((1, 3, 12, 12), complex)}], ["complex128"]),
    ],
)
def test_bad_samples(batch: list[dict[str, Any]], words: list[str]) -> None:
    text = refusal(batch)
    assert all(any(part in text for part in word.split("|")) for word in words), text


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4g2"])
def test_empty_tensors(recipe: str) -> None:
    text = "g (float[0,8] x) => (float[0,16] y) <float[8,16] w> { y = MatMul(x, w) }"
    batch = [{"x": np.zeros((0, 8), np.float32)}] * 2
    with pytest.raises(UserError, match=r"'x' is empty, \[0, 8\].*use a float recipe"):
        quantization.apply(build(text), QuantConfig.parse(recipe), batch, context())


def test_empty_tensors_of_integers_are_nothing_to_quantize() -> None:
    text = "g (int64[0,5] x) => (int64[5,0] y) { y = Transpose<perm=[1,0]>(x) }"
    batch = [{"x": np.zeros((0, 5), np.int64)}] * 2
    graph = quantization.apply(build(text), QuantConfig.parse("w4a8"), batch, context())
    assert [node.op_type for node in graph.graph] == ["Transpose"]


def test_weights_that_are_not_finite() -> None:
    weight = np.ones((8, 8, 1, 1), np.float32)
    weight[3] = np.nan
    assert "'w2'" in refusal([GOOD] * 2, w2=weight) or "NaN" in refusal([GOOD] * 2, w2=weight)


def test_activations_that_overflow() -> None:
    huge = np.full((8, 3, 3, 3), 1e38, np.float32)
    text = refusal([{"x": np.full((1, 3, 12, 12), 10, np.float32)}], w0=huge)
    assert "tensor '" in text and "infinity" in text


@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        (recipe, method)
        for recipe in ("w8a8", "w4a8", "w4a4", "w4g2")
        for method in ((), ("bias_correction",), ("mean_variance",), ("gptq",), ("reconstruction",))
        if (recipe, method) != ("w4g2", ("mean_variance",))  # it does not know weights alone
    ],
)
def test_dead_layers_and_channels_are_told_and_harmless(
    recipe: str, method: tuple[str, ...]
) -> None:
    dead = np.zeros((8, 8, 1, 1), np.float32)
    half = np.random.default_rng(0).standard_normal((4, 8, 1, 1)).astype(np.float32)
    half[:2] = 0
    model = build(MIXED, w2=dead, w3=half)
    result, used = quantize(model, recipe, methods=method)
    texts = [f"{n.subject}: {n.text}" for n in used.notes if n.warning]
    assert any("all weights are zero" in t for t in texts)
    assert any("2 of 4 output channels" in t for t in texts)
    assert np.isfinite(run(result, samples(model, 1)[0])[0]).all()


def test_constant_inputs_and_few_samples_are_told() -> None:
    used = context()
    result = quantization.apply(build(MIXED), QuantConfig(), [GOOD] * 3, used)
    texts = [f"{n.subject}: {n.text}" for n in used.notes if n.warning]
    assert any("only 3 samples" in t for t in texts)
    assert any(t.startswith("x: every sample") for t in texts)
    assert np.isfinite(run(result, GOOD)[0]).all()


@pytest.mark.parametrize("factor", [1e-36, 1e-20, 1e20])
def test_extreme_ranges_stay_finite(factor: float) -> None:
    model = build(MIXED)
    batch = [{"x": s["x"] * np.float32(factor)} for s in samples(model, 8)]
    for recipe in ("w8a8", "w4a8"):
        result = quantization.apply(model, QuantConfig.parse(recipe), batch, context())
        assert np.isfinite(run(result, batch[0])[0]).all()


def warnings(batch: list[dict[str, Any]], **weights: np.ndarray) -> list[str]:
    used = context()
    result = quantization.apply(build(MIXED, **weights), QuantConfig(), batch, used)
    assert np.isfinite(run(result, batch[0])[0]).all()
    return [f"{n.subject}: {n.text}" for n in used.notes if n.warning]


def test_good_input_is_no_reason_for_a_warning() -> None:
    assert not warnings(samples(build(MIXED)))


def test_ranges_that_underflow_are_named() -> None:
    batch = [{"x": s["x"] * np.float32(1e-37)} for s in samples(build(MIXED))]
    found = warnings(batch)
    assert any(text.startswith("x: its range underflows") for text in found)


def test_weights_whose_product_with_the_input_scale_underflows_are_named() -> None:
    tiny = np.full((4, 8, 1, 1), 1e-36, np.float32)
    batch = [{"x": s["x"] * np.float32(1e-3)} for s in samples(build(MIXED))]
    found = warnings(batch, w3=tiny)
    assert any("weight scales raised" in text and "underflow" in text for text in found)


def test_constant_channels_and_dead_layers_are_named() -> None:
    """A layer that its Relu switches off, and layers that see only constants."""
    off = np.full(8, -1e4, np.float32)
    found = warnings(samples(build(MIXED)), b0=off)
    assert any(text.startswith("r0: this tensor is 0 for every sample") for text in found)
    assert any("8 output channels never change" in text for text in found)


def test_a_bias_too_large_for_int32_raises_the_scale() -> None:
    weight = np.random.default_rng(1).standard_normal((8, 8, 1, 1)).astype(np.float32)
    weight[1] *= 1e-12
    bias = np.ones(8, np.float32)
    model = build(MIXED, w2=weight, b2=bias)
    result, used = quantize(model, methods=())
    assert any("int32 bias" in n.text for n in used.notes)
    found = [n for n in result.graph if n.op_type == "Conv"][2].inputs[2].producer()
    codes = found.inputs[0].const_value.numpy().astype(float)
    np.testing.assert_allclose(codes * found.inputs[1].const_value.numpy(), bias, rtol=1e-2)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"weight_bits": 3}, "weight_bits"),
        ({"weight_limit": 64}, "weight_limit"),
        ({"activation_bits": 16}, "activation_bits"),
        ({"observer": "minmx"}, "did you mean 'minmax'"),
        ({"methods": ("bias_correction", "reconstruction")}, "choose one"),
        ({"methods": ("adarond",)}, "did you mean 'adaround'"),
        ({"group_size": 32}, "weight-only"),
        ({"group_size": 1, "activation_bits": None}, "2…"),
        ({"percentile": 10.0}, "percentile"),
        ({"overrides": (("conv[", "float"),)}, "conv["),
        ({"overrides": (("conv", "w5a8"),)}, "w5a8"),
        ({"max_samples": 0}, "max_samples"),
        ({"first_last": "never"}, "first_last"),
    ],
)
def test_impossible_configurations(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as error:
        QuantConfig(**fields)
    assert word in str(error.value)


def test_recipes_by_name() -> None:
    assert QuantConfig.parse("w4a4").activation_bits == 4
    assert QuantConfig.parse("w8a16").activation_bits is None
    assert QuantConfig.parse("w4g32").group_size == 32
    with pytest.raises(UserError, match="w3a8"):
        QuantConfig.parse("w3a8")


def test_an_input_without_elements_is_no_constant() -> None:
    graph = build("net (float[1,0,4] x) => (float[1,0,4] y) <float[4] w> { y = Add(x, w) }").graph
    said: list[str] = []
    empty = [{"x": np.zeros((1, 0, 4), np.float32)}] * 2
    found = calibration.collect(
        graph, empty, QuantConfig(), lambda *words, doubt=False: said.append(words[1])
    )
    assert [array.shape for array in found.values()] == [(2, 1, 0, 4)]
    assert not [text for text in said if "constant" in text]
