"""Cases of edgepipe/passes/activations.py."""

from __future__ import annotations

import pytest

from edgepipe.passes import activations, clean

from .rewriting import assert_equal, rewrite

FORMULA = "another formula of the same function"

CONSTANTS = """float half = {0.5}, float one = {1.0}, float two = {2.0}, float three = {3.0},
 float six = {6.0}, float zero = {0.0}, float sixth = {0.16666667}, float root = {1.4142135},
 float inverse = {0.70710677}, float cubic = {0.044715}, float scale = {0.7978846},
 float small = {0.2}, float four = {4.0}"""

BOUNDS = {
    "max_zero": ("y = Max(x, zero)", ["Relu"]),
    "clip_zero": ("y = Clip(x, zero)", ["Relu"]),
    "relu_clip": ("h = Relu(x) y = Clip(h, , six)", ["Clip"]),
    "clip_relu": ("h = Clip(x, , six) y = Relu(h)", ["Clip"]),
    "min_max": ("h = Max(x, zero) y = Min(h, six)", ["Clip"]),
    "relu_relu": ("h = Relu(x) y = Relu(h)", ["Relu"]),
    "clip_without_bounds": ("h = Clip(x) y = Neg(h)", ["Identity", "Neg"]),
    "relu": ("y = Relu(x)", ["Relu"]),
    "min_alone": ("y = Min(x, six)", ["Clip"]),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_1_bounds(name: str) -> None:
    body, expected = BOUNDS[name]
    body = body.replace("(x", "(s")
    text = f"g (float[257] x) => (float[257] y) <{CONSTANTS}> {{ s = Mul(x, four) {body} }}"
    result = rewrite(text, activations.run, clean.run)
    assert result.ops == ["Mul", *expected]
    assert_equal(result)


ACTIVATIONS = {
    "gelu_div": (
        "a = Div(s, root) b = Erf(a) c = Add(b, one) d = Mul(s, c) y = Mul(d, half)",
        ["Gelu"],
    ),
    "gelu_mul": (
        "a = Mul(s, inverse) b = Erf(a) c = Add(one, b) h = Mul(half, s) y = Mul(h, c)",
        ["Gelu"],
    ),
    "gelu_half_inside": (
        "a = Mul(s, inverse) b = Erf(a) c = Add(one, b) d = Mul(c, half) y = Mul(s, d)",
        ["Gelu"],
    ),
    "gelu_tanh_pow": (
        """p = Pow(s, three) q = Mul(p, cubic) r = Add(s, q) t = Mul(r, scale) u = Tanh(t)
        v = Add(u, one) w = Mul(s, v) y = Mul(w, half)""",
        ["Gelu"],
    ),
    "gelu_tanh_products": (
        """p = Mul(s, s) p3 = Mul(p, s) q = Mul(cubic, p3) r = Add(q, s) t = Mul(scale, r)
        u = Tanh(t) v = Add(one, u) h = Mul(s, half) y = Mul(h, v)""",
        ["Gelu"],
    ),
    "hard_swish_div": (
        "a = Add(s, three) b = Clip(a, zero, six) c = Mul(s, b) y = Div(c, six)",
        ["HardSwish"],
    ),
    "hard_swish_gate": (
        "a = Add(s, three) b = Clip(a, zero, six) c = Mul(b, sixth) y = Mul(s, c)",
        ["HardSwish"],
    ),
    "hard_swish_hard_sigmoid": (
        "a = HardSigmoid<alpha=0.16666667, beta=0.5>(s) y = Mul(a, s)",
        ["HardSwish"],
    ),
    "hard_sigmoid": ("a = Add(s, three) b = Clip(a, zero, six) y = Div(b, six)", ["HardSigmoid"]),
    "mish": ("a = Softplus(s) b = Tanh(a) y = Mul(s, b)", ["Mish"]),
    "mish_spelt_out": (
        "e = Exp(s) f = Add(e, one) a = Log(f) b = Tanh(a) y = Mul(s, b)",
        ["Mish"],
    ),
    "sigmoid": ("n = Neg(s) e = Exp(n) a = Add(e, one) y = Reciprocal(a)", ["Sigmoid"]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_2_recognised(name: str) -> None:
    body, expected = ACTIVATIONS[name]
    text = f"g (float[257] x) => (float[257] y) <{CONSTANTS}> {{ s = Mul(x, two) {body} }}"
    result = rewrite(text, activations.run, clean.run, opset_version=20)
    assert result.ops == ["Mul", *expected]
    assert_equal(result, FORMULA)


def test_2_which_gelu() -> None:
    for name, approximation in (("gelu_div", "none"), ("gelu_tanh_pow", "tanh")):
        body, _ = ACTIVATIONS[name]
        text = f"g (float[9] x) => (float[9] y) <{CONSTANTS}> {{ s = Mul(x, two) {body} }}"
        node = rewrite(text, activations.run, opset_version=20).after
        (gelu,) = (n for n in node.graph if n.op_type == "Gelu")
        assert gelu.attributes.get_string("approximate", "none") == approximation


@pytest.mark.parametrize(
    "body",
    [
        # One constant off.
        "a = Div(s, two) b = Erf(a) c = Add(b, one) d = Mul(s, c) y = Mul(d, half)",
        "a = Add(s, three) b = Clip(a, zero, six) c = Mul(s, b) y = Mul(c, small)",
        # Another value is multiplied in the end.
        "a = Div(s, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)",
    ],
)
def test_2_near_misses_stay(body: str) -> None:
    text = f"g (float[257] x) => (float[257] y) <{CONSTANTS}> {{ s = Mul(x, two) {body} }}"
    result = rewrite(text, activations.run, clean.run, opset_version=20)
    assert not {"Gelu", "HardSwish"} & set(result.ops)
    assert_equal(result, FORMULA)


def test_2_inner_value_read_elsewhere_stays() -> None:
    text = f"""g (float[9] x) => (float[9] y, float[9] b) <{CONSTANTS}> {{
      a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)
    }}"""
    result = rewrite(text, activations.run, clean.run, opset_version=20)
    assert "Gelu" not in result.ops
    assert_equal(result)


def test_3_swish_stays_a_pair() -> None:
    text = "g (float[9] x) => (float[9] y) { s = Sigmoid(x) y = Mul(x, s) }"
    assert rewrite(text, activations.run, clean.run).ops == ["Sigmoid", "Mul"]
