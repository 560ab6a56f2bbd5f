"""Cases of edgepipe/passes/identity.py, reshape.py, clean.py and inline.py."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from edgepipe.errors import UserError
from edgepipe.passes import canonical, clean, identity, reshape

from .rewriting import assert_equal, normal, rewrite

# Between two operators that stay: h = Neg(x), y = Neg(i).
UNCHANGED = {
    "identity": "i = Identity(h)",
    "dropout": "i = Dropout(h)",
    "reshape": "i = Reshape(h, s)",
    "flatten": "i = Flatten<axis=1>(h)",
    "expand": "i = Expand(h, s)",
    "tile": "i = Tile(h, ones)",
    "slice": "i = Slice(h, zeros, s)",
    "pad": "i = Pad(h, nopads)",
    "transpose": "i = Transpose<perm=[0,1]>(h)",
    "cast": "i = Cast<to=1>(h)",
    "concat_of_one": "i = Concat<axis=0>(h)",
    "sum_of_one": "i = Sum(h)",
    "concat_with_empty": "none = Slice(h, six, six, zero) i = Concat<axis=0>(none, h)",
    "two_transposes": "j = Transpose(h) i = Transpose(j)",
    "chain": "j = Unsqueeze(h, zero) i = Squeeze(j, zero)",
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_1_to_5_unchanged(name: str) -> None:
    text = f"""g (float[4,6] x) => (float[4,6] y)
    <int64[2] s = {{4,6}}, int64[2] ones = {{1,1}}, int64[2] zeros = {{0,0}}, int64[1] zero = {{0}},
     int64[1] six = {{6}}, int64[4] nopads = {{0,0,0,0}}> {{
      h = Neg(x)
      {UNCHANGED[name]}
      y = Neg(i)
    }}"""
    passes = (canonical.run, identity.run, reshape.run, identity.run, clean.run)
    result = rewrite(text, *passes)
    assert result.ops == ["Neg", "Neg"]
    assert_equal(result, "moves data only")


@pytest.mark.parametrize(
    "call",
    [
        "Slice(x, minus, low, a, minus)",
        "Transpose<perm=[1,0]>(x)",
        "Cast<to=11>(x)",
        "Tile(x, two)",
    ],
)
def test_what_changes_the_value_stays(call: str) -> None:
    kind = "double" if "Cast" in call else "float"
    dims = "8,4" if "Tile" in call else "4,4"
    text = f"""g (float[4,4] x) => ({kind}[{dims}] y)
    <int64[1] minus = {{-1}}, int64[1] low = {{-9}}, int64[1] a = {{0}}, int64[2] two = {{2,1}}> {{
      y = {call}
    }}"""
    result = rewrite(text, identity.run)
    assert len(result.ops) == 1
    assert result.ops != ["Identity"]
    assert_equal(result, "moves data only")


def test_1_output_that_is_an_input_keeps_a_node() -> None:
    text = """g (float[4] x) => (float[4] y, float[4] z) {
      h = Identity(x)
      y = Dropout(h)
      z = Neg(y)
    }"""
    result = rewrite(text, identity.run, clean.run)
    assert sorted(result.ops) == ["Identity", "Neg"]
    assert [v.name for v in result.after.graph.outputs] == ["y", "z"]
    assert_equal(result, "moves data only")


def test_1_two_outputs_with_one_value() -> None:
    text = "g (float[4] x) => (float[4] y, float[4] z) { y = Neg(x) z = Identity(y) }"
    result = rewrite(text, identity.run, clean.run)
    assert [v.name for v in result.after.graph.outputs] == ["y", "z"]
    assert_equal(result, "moves data only")


def test_reshape_1_chain() -> None:
    text = """g (float[4,6] x) => (float[3,8] y) <int64[1] a = {-1}, int64[2] b = {3,8}> {
      h = Reshape(x, a)
      y = Reshape(h, b)
    }"""
    result = rewrite(text, canonical.run, reshape.run, clean.run)
    assert result.ops == ["Reshape"]
    assert_equal(result, "moves data only")


def test_reshape_2_transposes_merge() -> None:
    text = """g (float[2,3,4,5] x) => (float[A,B,C,D] y) {
      h = Transpose<perm=[0,2,3,1]>(x)
      y = Transpose<perm=[1,0,3,2]>(h)
    }"""
    result = rewrite(text, reshape.run, clean.run)
    assert list(result.node("Transpose").attributes.get_ints("perm")) == [2, 0, 1, 3]
    assert_equal(result, "moves data only")


def test_reshape_3_transpose_of_ones() -> None:
    text = "g (float[2,1,4,1] x) => (float[A,B,C,D] y) { y = Transpose<perm=[1,0,3,2]>(x) }"
    result = rewrite(text, reshape.run)
    assert result.ops == ["Reshape"]
    assert_equal(result, "moves data only")


def test_reshape_4_slices_merge() -> None:
    text = """g (float[6,7,8] x) => (float[A,B,C] y)
    <int64[1] one = {1}, int64[1] end = {9}, int64[1] a = {-1}, int64[1] b = {0},
     int64[1] two = {2}> {
      h = Slice(x, one, end, a, two)
      y = Slice(h, one, end, b)
    }"""
    result = rewrite(text, reshape.run, clean.run)
    assert result.ops == ["Slice"]
    assert_equal(result, "moves data only")


def test_reshape_4_slices_of_one_axis_stay() -> None:
    text = """g (float[6,7] x) => (float[A,B] y) <int64[1] one = {1}, int64[1] end = {9}> {
      h = Slice(x, one, end, one)
      y = Slice(h, one, end, one)
    }"""
    assert rewrite(text, reshape.run, clean.run).ops == ["Slice", "Slice"]


def test_reshape_5_concats_merge() -> None:
    text = """g (float[2,3] x, float[1,3] z) => (float[A,3] y) {
      h = Concat<axis=0>(x, z)
      y = Concat<axis=0>(z, h, x)
    }"""
    result = rewrite(text, canonical.run, reshape.run, clean.run)
    assert result.ops == ["Concat"]
    assert_equal(result, "moves data only")


def test_clean_1_dead_code() -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] w> { d = Add(x, w) e = Exp(d) y = Neg(x) }"
    result = rewrite(text, clean.run, w=normal(2))
    assert result.ops == ["Neg"]
    assert not result.after.graph.initializers


def test_clean_2_equal_initializers() -> None:
    text = """g (float[2] x) => (float[2] y) <float[2] a, float[2] b> {
      h = Add(x, a)
      y = Mul(h, b)
    }"""
    result = rewrite(text, clean.run, a=normal(2), b=normal(2))
    assert len(result.after.graph.initializers) == 1
    assert_equal(result)


def test_clean_3_common_subexpressions() -> None:
    text = "g (float[2] x) => (float[2] y) { a = Exp(x) b = Exp(x) y = Add(a, b) }"
    result = rewrite(text, clean.run)
    assert result.ops == ["Exp", "Add"]
    assert_equal(result)


def test_inline_1_local_functions() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[3] x) => (float[3] y) { h = own.twice<k=2.0>(x) y = own.twice<k=0.5>(h) }
    <domain: "own", opset_import: ["" : 17]>
    twice <k>(a) => (b) { c = Constant<value_float: float = @k>() b = Mul(a, c) }"""
    result = rewrite(ir.from_onnx_text(text), clean.run)
    assert result.ops == ["Mul", "Mul"]
    assert not result.after.functions
    assert_equal(result)


def test_inline_1_recursion_is_a_user_error() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    g (float[3] x) => (float[3] y) { y = own.f(x) }
    <domain: "own", opset_import: ["" : 17, "own" : 1]>
    f (a) => (b) { b = own.f(a) }"""
    with pytest.raises(UserError, match="model-local functions cannot be inlined"):
        rewrite(ir.from_onnx_text(text))


def test_inline_2_3_constants_and_inputs() -> None:
    text = """<ir_version: 3, opset_import: ["" : 9]>
    g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> {
      c = Constant<value=float[2] {3.0, 4.0}>()
      h = Mul(x, w)
      y = Add(h, c)
    }"""
    result = rewrite(ir.from_onnx_text(text), clean.run)
    assert result.ops == ["Mul", "Add"]
    assert [v.name for v in result.after.graph.inputs] == ["x"]
    assert_equal(result)
