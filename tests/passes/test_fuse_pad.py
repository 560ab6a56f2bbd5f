"""Cases of edgepipe/passes/fuse_pad.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.passes import canonical, fuse_pad

from .rewriting import assert_equal, normal, rewrite


def padded(operator: str, pads: str = "0,0,1,2,0,0,2,1", value: str = "", mode: str = "") -> str:
    weight = "float[6,4,3,3] w, " if "w" in operator else ""
    fill = f", float f = {{{value}}}" if value else ""
    given = ", f" if value else ""
    return f"""g (float[1,4,7,7] x) => (float[1,C,N,M] y)
    <{weight}int64[8] p = {{{pads}}}{fill}> {{
      h = Pad{mode}(x, p{given})
      y = {operator}
    }}"""


def test_1_conv() -> None:
    text = padded("Conv<pads=[1,0,0,1]>(h, w)")
    result = rewrite(text, canonical.run, fuse_pad.run, w=normal(6, 4, 3, 3))
    assert result.ops == ["Conv"]
    assert list(result.node("Conv").attributes.get_ints("pads")) == [2, 2, 2, 2]
    assert_equal(result)


def test_1_axes_input() -> None:
    text = """g (float[1,4,7,7] x) => (float[1,6,N,M] y)
    <float[6,4,3,3] w, int64[4] p = {1,2,2,1}, int64[2] a = {-2,3}> {
      h = Pad(x, p, , a)
      y = Conv(h, w)
    }"""
    result = rewrite(text, canonical.run, fuse_pad.run, opset_version=18, w=normal(6, 4, 3, 3))
    assert result.ops == ["Conv"]
    assert_equal(result)


@pytest.mark.parametrize(
    ("pads", "value", "mode", "reason"),
    [
        ("0,0,1,1,0,0,1,1", "1.5", "", "its value is 1.5, not zero"),
        ("0,0,1,1,0,0,1,1", "", '<mode="reflect">', "its mode is reflect"),
        ("0,0,1,1,0,0,-1,1", "", "", "it crops"),
    ],
)
def test_1_refused(pads: str, value: str, mode: str, reason: str) -> None:
    text = padded("Conv(h, w)", pads, value, mode)
    result = rewrite(text, canonical.run, fuse_pad.run, w=normal(6, 4, 3, 3))
    assert result.ops == ["Pad", "Conv"]
    assert any(reason in note for note in result.notes), result.notes
    assert_equal(result)


def test_1_channels_are_refused() -> None:
    text = padded("Conv(h, w)", "0,1,1,1,0,1,1,1").replace("float[6,4,3,3]", "float[6,6,3,3]")
    result = rewrite(text, canonical.run, fuse_pad.run, w=normal(6, 6, 3, 3))
    assert result.ops == ["Pad", "Conv"]
    assert any("batch or the channels" in note for note in result.notes)


@pytest.mark.parametrize("own", ["", ", pads=[1,1,1,1], count_include_pad=1"])
def test_2_average_pool(own: str) -> None:
    text = padded(f"AveragePool<kernel_shape=[3,3]{own}>(h)", "0,0,1,1,0,0,1,1")
    result = rewrite(text, canonical.run, fuse_pad.run)
    assert result.ops == ["AveragePool"]
    assert result.node("AveragePool").attributes.get_int("count_include_pad") == 1
    assert_equal(result)


def test_2_a_window_in_the_padding_of_both_is_refused() -> None:
    """ONNX Runtime takes no pool whose pads are as large as its window."""
    pool = "AveragePool<kernel_shape=[3,3], pads=[2,1,1,1], count_include_pad=1>(h)"
    result = rewrite(padded(pool, "0,0,2,0,0,0,1,2"), canonical.run, fuse_pad.run)
    assert result.ops == ["Pad", "AveragePool"]
    assert any("wholly in the padding" in note for note in result.notes)
    assert_equal(result)


def test_2_own_pads_not_counted_are_refused() -> None:
    text = padded("AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(h)", "0,0,1,1,0,0,1,1")
    result = rewrite(text, canonical.run, fuse_pad.run)
    assert result.ops == ["Pad", "AveragePool"]
    assert_equal(result)


@pytest.mark.parametrize("value", ["-inf", "-3.4028234663852886e38"])
def test_3_max_pool_lowest_value(value: str) -> None:
    text = padded("MaxPool<kernel_shape=[3,3]>(h)", "0,0,1,1,0,0,1,1", "0")
    text = text.replace("float f = {0}", "float f")
    fill = np.float32(value)
    result = rewrite(text, canonical.run, fuse_pad.run, f=fill)
    assert result.ops == ["MaxPool"]
    assert_equal(result, "moves data only")


def test_3_zero_before_max_pool_stays() -> None:
    text = padded("MaxPool<kernel_shape=[3,3]>(h)", "0,0,1,1,0,0,1,1")
    result = rewrite(text, canonical.run, fuse_pad.run)
    assert result.ops == ["Pad", "MaxPool"]
    assert any("could win against the image" in note for note in result.notes)


def test_two_readers() -> None:
    text = """g (float[1,4,7,7] x) => (float[1,6,N,M] y, float[1,4,K,L] z)
    <float[6,4,3,3] w, int64[8] p = {0,0,1,1,0,0,1,1}> {
      h = Pad(x, p)
      y = Conv(h, w)
      z = Relu(h)
    }"""
    result = rewrite(text, canonical.run, fuse_pad.run, w=normal(6, 4, 3, 3))
    assert sorted(result.ops) == ["Conv", "Pad", "Relu"]
    assert result.node("Conv").inputs[0].name == "x"
    assert_equal(result)
