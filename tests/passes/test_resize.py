"""Cases of edgepipe/passes/resize.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.passes import resize

from .rewriting import assert_equal, normal, rewrite

EXACT = "moves data only"


def graph(body: str, y: str = "1,3,8,12", w: str = "3,4,1,1") -> str:
    weights = f"<float[{w}] w, float[3] b, float[4] scales>"
    return f"g (float[1,4,4,4] x) => (float[{y}] y) {weights} {{ {body} }}"


CONSTANTS = {"b": normal(3), "scales": np.array([1, 1, 2, 3], np.float32)}
ENLARGED = 'h = Resize<mode="nearest", coordinate_transformation_mode="asymmetric">(x, , scales) '


def test_1_2_a_pointwise_convolution_and_its_activation_come_first() -> None:
    body = ENLARGED + "c = Conv(h, w, b) r = Relu(c) y = Sigmoid(r)"
    result = rewrite(graph(body), resize.run, w=normal(3, 4, 1, 1), **CONSTANTS)
    assert result.ops == ["Conv", "Relu", "Sigmoid", "Resize"]
    shape = result.node("Conv").outputs[0].shape
    assert shape is not None and list(shape) == [1, 3, 4, 4]
    assert result.after.graph.outputs[0].name == "y"
    assert_equal(result)


def test_1_sizes_say_the_channels_of_what_is_enlarged() -> None:
    text = """g (float[1,4,4,4] x) => (float[1,3,8,12] y)
      <float[3,4,1,1] w, float[3] b, int64[4] sizes> {
      h = Resize<mode="nearest">(x, , , sizes) y = Conv(h, w, b)
    }"""
    sizes = np.array([1, 4, 8, 12])
    result = rewrite(text, resize.run, w=normal(3, 4, 1, 1), b=normal(3), sizes=sizes)
    assert result.ops == ["Conv", "Resize"]
    assert result.constant("Resize", 3).tolist() == [1, 3, 8, 12]
    assert_equal(result)


@pytest.mark.parametrize(
    ("body", "y", "w", "reason"),
    [
        (ENLARGED + "y = Conv<pads=[1,1,1,1]>(h, w, b)", "1,3,8,12", "3,4,3,3", "not pointwise"),
        (ENLARGED + "y = Conv<strides=[2,2]>(h, w, b)", "1,3,4,6", "3,4,1,1", "not pointwise"),
        (ENLARGED + "y = Conv(h, w)", "1,9,8,12", "9,4,1,1", "more channels out than in"),
        (
            'h = Resize<mode="linear">(x, , scales) y = Conv(h, w, b)', "1,3,8,12", "3,4,1,1",
            "its mode is linear",
        ),
    ],
)  # fmt: skip
def test_what_stays(body: str, y: str, w: str, reason: str) -> None:
    weight = normal(*map(int, w.split(",")))
    result = rewrite(graph(body, y, w), resize.run, w=weight, **CONSTANTS)
    assert result.ops == ["Resize", "Conv"]
    assert reason in result.notes[0]


def test_a_second_reader_keeps_the_order() -> None:
    body = ENLARGED + "c = Conv(h, w, b) s = ReduceSum<keepdims=1>(h) y = Add(c, s)"
    result = rewrite(graph(body), resize.run, w=normal(3, 4, 1, 1), **CONSTANTS)
    assert result.ops == ["Resize", "Conv", "ReduceSum", "Add"]
