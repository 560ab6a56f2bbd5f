"""What has no tflite form is refused in one line that names the operator."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from quantization.networks import MIXED, build, context, samples

from edgepipe import quantization
from edgepipe.errors import Unsupported, UserError
from edgepipe.interchange import tflite
from edgepipe.quantization import QuantConfig
from interchange.litert import quantize
from interchange.operators import HEAD, INPUT, network


def refusal(text: str) -> str:
    with pytest.raises(Unsupported) as caught:
        tflite.write(quantize(build(text)))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("tflite: ")
    return message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            """n (float[1, 4, 5, 5, 5] x) => (float[] z) <float[6,4,1,1,1] w> {
            z = Conv(x, w) }""",
            "Conv '.*' has no tflite form: it has 3 spatial axes",
        ),
        (
            f"n ({INPUT}) => (float[] z) <float[4,2,3,3] w> {{ z = ConvTranspose<group=2>(x, w) }}",
            "ConvTranspose .* only one group",
        ),
        (
            network(f"y = MaxPool<kernel_shape=[2,2], dilations=[2,2]>(x)\n{HEAD}"),
            "MaxPool .* dilated",
        ),
        (
            network(
                "y = AveragePool<kernel_shape=[3,3], pads=[2,1,0,1], strides=[2,2]>(x)\n" + HEAD
            ),
            "AveragePool .* count differently",
        ),
        (
            network(f'y = Pad<mode="edge">(x, p)\n{HEAD}', "int64[8] p = {0,0,1,1,0,0,1,1}"),
            "Pad .* mode is edge",
        ),
        (
            network("a = Conv(x, wz, bz)\ny = Softplus(a)\nz = Relu(y)"),
            "Softplus .* no such operator",
        ),
        (
            """n (float[1, 4, 9, 7] x) => (float[] z) <float[4,4,1,1] w, float[4,4,1,1] v> {
            a = Conv(x, w)
            b = Resize<mode="nearest", nearest_mode="ceil">(a, , , k)
            z = Conv(b, v) }""".replace(
                "float[4,4,1,1] v>", "float[4,4,1,1] v, int64[4] k = {1, 4, 5, 5}>"
            ),
            "Resize .* source pixels",
        ),
        (
            """n (float[1, 4, 9, 7] x) => (float[] z) <float[4,4,1,1] w, float[4,4,1,1] v,
            float k = {0.5}> {
            a = Conv(x, w)
            b = Exp(a)
            c = Div(b, k)
            d = Mul(c, b)
            z = Conv(d, v) }""",
            "float",
        ),
    ],
)
def test_operators_without_a_form(text: str, names: str) -> None:
    assert re.search(names, refusal(text))


def test_weight_only_recipes() -> None:
    for recipe in ("w8a16", "w4g32"):
        with pytest.raises(UserError, match=r"weight-only.*w8a8"):
            tflite.config(QuantConfig.parse(recipe))


@pytest.mark.parametrize("field", ["fuse_residual", "quantize_outputs"])
def test_graphs_quantized_for_other_engines(field: str) -> None:
    model = build(MIXED)
    wanted = tflite.config(QuantConfig.parse("w8a8", methods=()))
    other = replace(wanted, **{field: not getattr(wanted, field)})
    graph = quantization.apply(model, other, samples(model), context())
    with pytest.raises(Unsupported, match=r"edgepipe\.interchange\.tflite\.config"):
        tflite.write(graph)


def test_float_graphs() -> None:
    with pytest.raises(Unsupported, match=r"Conv '.*' has no tflite form: its weight"):
        tflite.write(build(MIXED))


def test_unsigned_codes_are_moved() -> None:
    model = build(MIXED)
    wanted = tflite.config(QuantConfig.parse("w8a8", methods=()))
    signed, unsigned = (
        tflite.write(quantization.apply(model, config, samples(model), context()))
        for config in (wanted, replace(wanted, signed_activations=False))
    )
    assert signed == unsigned
