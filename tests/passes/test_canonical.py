"""Cases of edgepipe/passes/canonical.py."""

from __future__ import annotations

import pytest

from edgepipe.errors import UserError
from edgepipe.passes import canonical, clean, identity

from .rewriting import assert_equal, normal, rewrite


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("Sum", ["Add", "Add"]),
        ("Mean", ["Add", "Add", "Mul"]),
        ("Max", ["Max", "Max"]),
        ("Min", ["Min", "Min"]),
    ],
)
def test_1_variadic(op: str, expected: list[str]) -> None:
    text = f"g (float[2,3] a, float[3] b, float[2,1] c) => (float[2,3] y) {{ y = {op}(a, b, c) }}"
    result = rewrite(text, canonical.run)
    assert result.ops == expected
    assert_equal(result)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(
    "call",
    [
        'Conv<auto_pad="A", strides=[2,3]>(x, w)',
        'Conv<auto_pad="A">(x, w)',
        'MaxPool<auto_pad="A", kernel_shape=[2,3]>(x)',
        'AveragePool<auto_pad="A", kernel_shape=[4,3], strides=[2,1]>(x)',
        'ConvTranspose<auto_pad="A", strides=[2,3]>(x, t)',
    ],
)
def test_2_auto_pad(call: str, auto: str) -> None:
    weights = {"w": normal(2, 2, 4, 3), "t": normal(2, 2, 4, 3, seed=1)}
    used = {name: array for name, array in weights.items() if f", {name})" in call}
    declared = "".join(f"<float[2,2,4,3] {name}>" for name in used)
    text = f"""g (float[1,2,9,10] x) => (float[1,2,N,M] y) {declared} {{
      y = {call.replace('"A"', f'"{auto}"')}
    }}"""
    result = rewrite(text, canonical.run, **used)
    (node,) = result.after.graph
    assert "auto_pad" not in node.attributes
    assert len(node.attributes.get_ints("pads")) == 4
    assert_equal(result)


@pytest.mark.parametrize("wanted", ["[10,8]", "[7,5]"])
def test_2_conv_transpose_output_shape(wanted: str) -> None:
    text = f"""g (float[1,2,3,3] x) => (float[1,2,N,M] y) <float[2,2,3,3] w> {{
      y = ConvTranspose<strides=[3,2], output_shape={wanted}>(x, w)
    }}"""
    result = rewrite(text, canonical.run, w=normal(2, 2, 3, 3))
    assert "output_shape" not in result.node("ConvTranspose").attributes
    assert_equal(result)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 1)])
def test_2_auto_pad_decides_over_output_padding(kernel: tuple[int, int]) -> None:
    """Output padding counts where a kernel shorter than its stride leaves room for it."""
    text = f"""g (float[1,2,3,3] x) => (float[1,2,N,M] y) <float[2,2,{kernel[0]},{kernel[1]}] w> {{
      y = ConvTranspose<strides=[3,2], output_padding=[1,1], auto_pad="SAME_UPPER">(x, w)
    }}"""
    result = rewrite(text, canonical.run, w=normal(2, 2, *kernel))
    assert "auto_pad" not in result.node("ConvTranspose").attributes
    assert_equal(result)


def test_3_attributes_are_written_out() -> None:
    text = "g (float[1,2,5,5] x) => (float[1,3,N,M] y) <float[3,2,3,3] w> { y = Conv(x, w) }"
    node = rewrite(text, canonical.run, w=normal(3, 2, 3, 3)).node("Conv")
    found = {name: tuple(node.attributes.get_ints(name)) for name in ("kernel_shape", "pads")}
    assert found == {"kernel_shape": (3, 3), "pads": (0, 0, 0, 0)}
    assert node.attributes.get_int("group") == 1


def test_4_cast_like() -> None:
    text = "g (float[3] x, int64[1] t) => (int64[3] y) { y = CastLike(x, t) }"
    result = rewrite(text, canonical.run)
    assert result.ops == ["Cast"]
    assert_equal(result, "moves data only")


def test_5_negative_axes() -> None:
    text = "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax(x) }"
    result = rewrite(text, canonical.run)
    assert result.node("Softmax").attributes.get_int("axis") == 2
    assert_equal(result)


@pytest.mark.parametrize(("axes", "expected"), [("{-1,0}", [0, 2]), ("{1}", [1]), ("", [0, 1, 2])])
def test_6_reduce_axes(axes: str, expected: list[int]) -> None:
    count = axes.count(",") + 1
    declared, given = (f"<int64[{count}] a = {axes}>", ", a") if axes else ("", "")
    text = f"g (float[2,3,4] x) => (float[N,M,K] y) {declared} {{ y = ReduceMax(x{given}) }}"
    result = rewrite(text, canonical.run, opset_version=20)
    assert result.constant("ReduceMax", 1).tolist() == expected
    assert_equal(result)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceL1", "ReduceSumSquare", "ReduceLogSum"])
def test_6_no_axes(op: str) -> None:
    text = f"""g (float[2,3] x) => (float[2,3] y) <int64[0] a> {{
      h = Exp(x)
      y = {op}<noop_with_empty_axes=1>(h, a)
    }}"""
    import numpy as np

    result = rewrite(text, canonical.run, identity.run, opset_version=20, a=np.zeros(0, np.int64))
    assert not any(name.startswith("Reduce") for name in result.ops)


@pytest.mark.parametrize(
    "call",
    [
        "Flatten<axis=2>(x)",
        "Reshape(x, t)",
        "Squeeze(x, a)",
        "Unsqueeze(x, b)",
    ],
)
def test_7_reshapes(call: str) -> None:
    text = f"""g (float[2,1,3,4] x) => (float[N,M,K] y)
    <int64[3] t = {{0,-1,12}}, int64[1] a = {{1}}, int64[2] b = {{0,-1}}> {{
      h = {call}
      y = Neg(h)
    }}"""
    rank = {"Flatten": "N,M", "Unsqueeze": "A,B,C,D,E,F"}.get(call.partition("<")[0].split("(")[0])
    text = text.replace("float[N,M,K] y", f"float[{rank}] y") if rank else text
    result = rewrite(text, canonical.run, clean.run)
    assert result.ops == ["Reshape", "Neg"]
    assert min(result.constant("Reshape", 1)) > 0
    assert_equal(result, "moves data only")


def test_8_mean_over_the_image() -> None:
    text = "g (float[2,3,4,5] x) => (float[2,3] y) { y = ReduceMean<axes=[-1,-2], keepdims=0>(x) }"
    result = rewrite(text, canonical.run)
    assert result.ops == ["GlobalAveragePool", "Reshape"]
    assert_equal(result)


def test_8_sequences_are_left_alone() -> None:
    text = "g (float[2,3,4] x) => (float[2,3,1] y) { y = ReduceMean<axes=[-1]>(x) }"
    assert rewrite(text, canonical.run).ops == ["ReduceMean"]


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_9_mean_of_integers(kind: str) -> None:
    """Of either sign: the centred ones have means of both."""
    text = f"""g ({kind}[2,3,4,5] x, {kind}[3,4,5] m) => ({kind}[2,3] y, {kind}[2,3,1,5] z) {{
      c = Sub(x, m)
      y = ReduceMean<axes=[-1,-2], keepdims=0>(c)
      z = ReduceMean<axes=[2]>(c)
    }}"""
    result = rewrite(text, canonical.run)
    assert result.ops == ["Sub", "ReduceSum", "Div", "ReduceSum", "Div"]
    assert_equal(result, "moves data only")


def test_8_average_pool_over_the_image() -> None:
    text = "g (float[2,3,4,5] x) => (float[2,3,1,1] y) { y = AveragePool<kernel_shape=[4,5]>(x) }"
    result = rewrite(text, canonical.run)
    assert result.ops == ["GlobalAveragePool"]
    assert_equal(result)


@pytest.mark.parametrize("op", ["AveragePool", "MaxPool"])
def test_windows_that_do_not_fit_are_refused(op: str) -> None:
    text = f"g (float[2,4,2,3] x) => (float[2,4,3,n] y) {{ y = {op}<kernel_shape=[4,4], "
    text += "pads=[3,0,1,0], strides=[1,3]>(x) }"
    with pytest.raises(UserError, match="a window of 4 does not fit into 3"):
        rewrite(text, canonical.run)
