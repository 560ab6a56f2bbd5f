"""Cases of edgepipe/passes/normalization.py."""

from __future__ import annotations

import pytest

from edgepipe.passes import canonical, clean, normalization

from .rewriting import assert_equal, normal, rewrite

FORMULA = "another formula of the same function"
PASSES = (canonical.run, clean.run, normalization.run, clean.run)

HEAD = """g (float[2,5,8] x) => (float[2,5,8] y)
<int64[1] a = {-1}, float eps = {0.00001}, float two = {2.0}, float one = {1.0},
 float half = {0.5}, float minus = {-0.5}, float[8] s, float[8] b> {
"""
CENTRED = "m = ReduceMean(x, a) d = Sub(x, m) "
TAIL = "z = Mul(n, s) y = Add(z, b) }"

LAYER_NORMS = {
    "pow_sqrt_div": CENTRED + "q = Pow(d, two) v = ReduceMean(q, a) e = Add(v, eps) "
    "r = Sqrt(e) n = Div(d, r) ",
    "product_reciprocal": CENTRED + "q = Mul(d, d) v = ReduceMean(q, a) e = Add(v, eps) "
    "r = Sqrt(e) i = Reciprocal(r) n = Mul(i, d) ",
    "one_over": CENTRED + "q = Mul(d, d) v = ReduceMean(q, a) e = Add(v, eps) "
    "r = Sqrt(e) i = Div(one, r) n = Mul(d, i) ",
    "power_of_minus_half": CENTRED + "q = Mul(d, d) v = ReduceMean(q, a) e = Add(v, eps) "
    "i = Pow(e, minus) n = Mul(d, i) ",
    "difference_twice": CENTRED + "k = Sub(x, m) q = Pow(k, two) v = ReduceMean(q, a) "
    "e = Add(v, eps) r = Pow(e, half) n = Div(d, r) ",
    "mean_twice": "m = ReduceMean(x, a) d = Sub(x, m) p = ReduceMean(x, a) k = Sub(x, p) "
    "q = Pow(k, two) v = ReduceMean(q, a) e = Add(v, eps) r = Sqrt(e) n = Div(d, r) ",
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_1_layer_norm(name: str) -> None:
    text = HEAD + LAYER_NORMS[name] + TAIL
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8, seed=1), b=normal(8, seed=2))
    assert result.ops == ["LayerNormalization"]
    node = result.node("LayerNormalization")
    assert node.attributes.get_int("axis") == 2
    assert node.attributes.get_float("epsilon") == pytest.approx(1e-5)
    assert_equal(result, FORMULA)


def test_1_without_scale_and_bias() -> None:
    text = HEAD + LAYER_NORMS["pow_sqrt_div"] + "y = Neg(n) }"
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert result.ops == ["LayerNormalization", "Neg"]
    assert_equal(result, FORMULA)


def test_1_several_axes() -> None:
    text = (HEAD + LAYER_NORMS["pow_sqrt_div"] + "y = Neg(n) }").replace(
        "int64[1] a = {-1}", "int64[2] a = {-1,1}"
    )
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert result.node("LayerNormalization").attributes.get_int("axis") == 1
    assert_equal(result, FORMULA)


def test_1_other_axes_are_noted() -> None:
    text = (HEAD + LAYER_NORMS["pow_sqrt_div"] + "y = Neg(n) }").replace("{-1}", "{1}")
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert "LayerNormalization" not in result.ops
    assert any("the axes are not the last ones" in note for note in result.notes)
    assert_equal(result, FORMULA)


def test_1_spread_of_another_value_stays() -> None:
    body = LAYER_NORMS["pow_sqrt_div"].replace("Pow(d, two)", "Pow(x, two)")
    result = rewrite(HEAD + body + TAIL, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert "LayerNormalization" not in result.ops
    assert_equal(result, FORMULA)


SOFTMAXES = {
    "with_maximum": "m = ReduceMax(x, a) d = Sub(x, m) e = Exp(d) t = ReduceSum(e, a) "
    "y = Div(e, t) }",
    "without_maximum": "e = Exp(x) t = ReduceSum(e, a) y = Div(e, t) }",
    "reciprocal": "e = Exp(x) t = ReduceSum(e, a) r = Reciprocal(t) y = Mul(e, r) }",
}


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_2_softmax(name: str, axis: int) -> None:
    text = (HEAD + SOFTMAXES[name]).replace("{-1}", f"{{{axis}}}")
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert result.ops == ["Softmax"]
    assert result.node("Softmax").attributes.get_int("axis") == axis % 3
    assert_equal(result, FORMULA)


def test_2_two_axes_stay() -> None:
    text = (HEAD + SOFTMAXES["without_maximum"]).replace("int64[1] a = {-1}", "int64[2] a = {1,2}")
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert "Softmax" not in result.ops


def test_3_rms_norm() -> None:
    body = "q = Pow(x, two) v = ReduceMean(q, a) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) "
    text = HEAD + body + "n = Mul(x, i) y = Mul(s, n) }"
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8, seed=1), b=normal(8))
    assert result.ops == ["RMSNormalization"]
    assert_equal(result, FORMULA)


def test_3_a_scalar_has_no_axes() -> None:
    body = "q = Pow(x, two) v = ReduceMean(q) e = Add(v, eps) r = Sqrt(e) i = Reciprocal(r) "
    text = (HEAD + body + "n = Mul(x, i) y = Mul(two, n) }").replace("float[2,5,8]", "float")
    result = rewrite(text, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert "RMSNormalization" not in result.ops
    assert_equal(result, FORMULA)


@pytest.mark.parametrize(
    "body",
    [
        "t = Softmax<axis=-1>(x) y = Log(t) }",
        "e = Exp(x) t = ReduceSum(e, a) l = Log(t) y = Sub(x, l) }",
        "l = ReduceLogSumExp(x, a) y = Sub(x, l) }",
    ],
)
def test_4_log_softmax(body: str) -> None:
    result = rewrite(HEAD + body, *PASSES, opset_version=18, s=normal(8), b=normal(8))
    assert result.ops == ["LogSoftmax"]
    assert_equal(result, FORMULA)
