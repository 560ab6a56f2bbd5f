"""Metrics: their values by hand, and that a wrong result cannot hide (positive controls)."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from edgepipe.float64 import Float64Model, to_double
from edgepipe.metrics import Accuracy, Distance, Steps, float64_reference, snr_db


def distance(result: np.ndarray, reference: np.ndarray) -> Distance:
    d = Distance()
    d.add(result, reference)
    return d


def scores(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((64, 10)).astype(np.float32)


def test_equal_is_infinite_and_noise_is_counted() -> None:
    r = scores()
    d = distance(r, r)
    assert (d.snr_db, d.cosine, d.max_abs, d.top1_agreement) == (
        math.inf,
        pytest.approx(1.0),
        0.0,
        1.0,
    )
    assert snr_db(np.float32([1.1]), np.float32([1.0])) == pytest.approx(20.0, abs=1e-4)
    assert distance(np.float32([1.5, 2.0]), np.float32([1.0, 2.0])).max_abs == 0.5


def test_samples_add_up_to_the_whole() -> None:
    r, y = scores(), scores() + 1e-3 * scores(1)
    whole, parts = distance(y, r), Distance()
    for i in range(0, 64, 8):
        parts.add(y[i : i + 8], r[i : i + 8])
    assert parts.snr_db == pytest.approx(whole.snr_db)
    assert parts.cosine == pytest.approx(whole.cosine)
    assert parts.top1_agreement == whole.top1_agreement


def test_swapped_channels_and_a_scaled_channel_are_seen() -> None:
    r = scores()
    swapped = r[:, [1, 0, *range(2, 10)]]
    scaled = r * np.float32([2] + [1] * 9)
    assert distance(swapped, r).snr_db < 10
    assert distance(scaled, r).snr_db < 15
    assert (distance(swapped, r).top1_agreement or 1.0) < 0.9


@pytest.mark.parametrize(
    ("result", "reference", "expected"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], math.inf),
        ([np.inf, 1.0], [np.inf, 1.0], math.inf),
        ([np.nan, 1.0], [1.0, 1.0], -math.inf),
        ([1.0, 1.0], [np.inf, 1.0], -math.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], -math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([1.0, 0.0], [0.0, 0.0], -math.inf),
    ],
)
def test_values_that_are_not_finite(result: list, reference: list, expected: float) -> None:
    assert snr_db(np.float32(result), np.float32(reference)) == expected


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shape"):
        distance(np.zeros((2, 3)), np.zeros((3, 2)))


def test_integers_and_booleans_are_compared_exactly() -> None:
    assert snr_db(np.array([True, False]), np.array([True, False])) == math.inf
    assert snr_db(np.int64([3, 4]), np.int64([3, 5])) < 20


def test_accuracy_counts_winners() -> None:
    accuracy = Accuracy()
    accuracy.add(np.float32([[0, 1], [1, 0], [0, 1]]), np.int64([1, 1, 1]))
    assert accuracy.top1 == pytest.approx(2 / 3)


MODELS = {
    "conv, grouped, depthwise, strides, dilation": (
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1,4,9,8] x) => (float[1,4,m,n] y)'
        "<float[6,2,3,3] w = {1}, float[6] b = {1}, float[6,1,2,3] d = {1},"
        " float[4,6,1,1] p = {1}> {"
        " a = Conv<group=2, pads=[1,0,2,1], strides=[2,1]>(x, w, b)"
        " c = Conv<group=6, dilations=[1,2], pads=[0,1,1,0]>(a, d)"
        ' y = Conv<strides=[2,2], auto_pad="SAME_UPPER">(c, p) }'
    ),
    "pools with ceil mode": (
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1,3,10,11] x) => (float[1,3,m,n] y) {'
        " a = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1, pads=[1,0,0,1]>(x)"
        " b = AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1, pads=[1,1,0,0]>(a)"
        " y = AveragePool<kernel_shape=[2,2], count_include_pad=1, pads=[0,1,1,0]>(b) }"
    ),
    "batch normalisation of opset 9": (
        '<ir_version: 4, opset_import: ["" : 9]> g (float[1,3,4,4] x) => (float[1,3,4,4] y)'
        "<float[3] s = {1}, float[3] b = {1}, float[3] m = {1}, float[3] v = {1}> {"
        " y = BatchNormalization<epsilon=0.01>(x, s, b, m, v) }"
    ),
    "constants, casts and shapes": (
        '<ir_version: 8, opset_import: ["" : 18]> g (float[2,3] x) => (float[2,3] y) {'
        " half = Constant<value_float=0.5>() s = Shape(x) z = ConstantOfShape(s)"
        " i = Cast<to=7>(x) f = Cast<to=1>(i) a = Mul(f, half) b = Add(a, z) y = Softmax(b) }"
    ),
}


def build(text: str) -> onnx.ModelProto:
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for info in list(model.graph.initializer):
        info.CopyFrom(
            onnx.numpy_helper.from_array(
                np.abs(rng.standard_normal(info.dims)).astype(np.float32) + 0.1, info.name
            )
        )
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_float64_run_agrees_with_onnx_runtime(name: str) -> None:
    model = build(MODELS[name])
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    (expected,) = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(None, {"x": x})
    y = float64_reference(model, {"x": x})["y"]
    assert y.dtype == np.float64
    assert snr_db(expected, y) > 125  # float32 has 24 bits: 144 dB for one rounding


def test_the_float64_run_is_double_all_the_way() -> None:
    """A sum that float32 loses: (x + 1e-9) − x with x = 1."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 18]> g (float[1] x) => (float[1] y)'
        "<float[1] small = {1e-9}> { a = Add(x, small) y = Sub(a, x) }"
    )
    y = Float64Model(model).run({"x": np.ones(1, np.float32)})["y"]
    assert y[0] == pytest.approx(1e-9, rel=1e-6)
    assert model.graph.initializer[0].data_type == onnx.TensorProto.FLOAT  # the original is whole
    assert to_double(model).graph.initializer[0].data_type == onnx.TensorProto.DOUBLE


def steps(result: np.ndarray, reference: np.ndarray) -> Steps:
    s = Steps()
    s.add(result, reference)
    return s


def test_steps_are_counted_once_the_step_is_known() -> None:
    reference = np.linspace(-1, 3, 1000, dtype=np.float32)
    result = reference.copy()
    result[:10] += np.float32(0.1)  # one step
    result[10:13] -= np.float32(0.21)  # more than two
    s = steps(result, reference)
    assert s.span == pytest.approx(4.0)
    assert s.share_within(0.1) == pytest.approx(0.997)
    assert s.share_within(0.05) == pytest.approx(0.987)
    assert s.share_within(0.3) == 1.0
    assert s.largest == pytest.approx(0.21, rel=1e-5)


def test_steps_allow_for_the_rounding_of_a_step_but_not_for_a_tenth() -> None:
    zero = np.zeros(4, np.float32)
    for step in (0.1, 0.125, 1.0, 3e-5):
        assert steps(zero + np.float32(step * (1 + 1e-6)), zero).share_within(step) == 1.0
        assert steps(zero + np.float32(step * 1.1), zero).share_within(step) == 0.0


def test_steps_span_zero_and_survive_what_is_not_finite() -> None:
    reference = np.float32([2, 3, np.inf, np.nan])
    s = steps(np.float32([2, np.nan, np.inf, np.nan]), reference)
    assert s.span == 3.0
    assert s.share_within(1e9) == 0.75
    assert s.largest == math.inf


def test_steps_of_integers_are_equality() -> None:
    s = steps(np.int64([1, 2, 4]), np.int64([1, 2, 3]))
    assert s.share_within(s.span) == pytest.approx(2 / 3)
