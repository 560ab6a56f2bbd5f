"""Cases of edgepipe/passes/fold.py, shapes.py and evaluate.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.passes import clean, fold, shapes
from edgepipe.passes.editor import shape_of

from .rewriting import assert_equal, normal, rewrite


def test_1_constants() -> None:
    result = rewrite(
        """g (float[2,3] x) => (float[2,3] y) <float[3] a, float[3] b> {
          c = Mul(a, b)
          d = Exp(c)
          y = Add(x, d)
        }""",
        clean.run,
        a=normal(3),
        b=normal(3, seed=1),
    )
    assert result.ops == ["Add"]
    assert_equal(result)


def test_1_positive_control() -> None:
    """A fold that is wrong by one part in a thousand is noticed."""
    text = "g (float[4] x) => (float[4] y) <float[4] a> { y = Add(x, a) }"
    result = rewrite(text, a=normal(4))
    result.after = rewrite(text, a=normal(4) * np.float32(1.01)).after
    with pytest.raises(AssertionError, match="relative error"):
        assert_equal(result)


def test_1_a_constant_output_keeps_a_node() -> None:
    result = rewrite(
        """g (float[3] x) => (float[3] y, float[3] z) <float[3] a> {
          z = Neg(a)
          y = Neg(x)
        }""",
        clean.run,
        a=normal(3),
    )
    assert sorted(result.ops) == ["Identity", "Neg"]
    assert [v.name for v in result.after.graph.outputs] == ["y", "z"]
    assert_equal(result, "moves data only")


def test_1_a_constant_output_that_others_read_keeps_its_node() -> None:
    result = rewrite(
        """g (float[3] x) => (float[3] y, float[3] z, float[3] s) <float[3] a> {
          y = Identity(a)
          z = Neg(y)
          s = Add(x, y)
        }""",
        fold.run,
        a=normal(3),
    )
    assert sorted(result.ops) == ["Add", "Identity", "Identity"]
    assert [v.name for v in result.after.graph.outputs] == ["y", "z", "s"]
    assert_equal(result, "moves data only")


def test_2_shape_and_size() -> None:
    result = rewrite(
        """g (float[2,3,4] x) => (int64[2] s, int64 n) {
          s = Shape<start=-2>(x)
          n = Size(x)
        }"""
    )
    outputs = {
        v.name: v.producer().inputs[0].const_value.numpy() for v in result.after.graph.outputs
    }
    assert outputs["s"].tolist() == [3, 4]
    assert outputs["n"] == 24


def test_3_shape_arithmetic_in_one_sweep() -> None:
    """The exporter's way to flatten: Shape, Gather, Unsqueeze, Concat, Reshape."""
    result = rewrite(
        """g (float[2,3,4] x) => (float[N,M] y)
        <int64 zero = {0}, int64[1] axes = {0}, int64[1] rest = {-1}> {
          s = Shape(x)
          n = Gather(s, zero)
          u = Unsqueeze(n, axes)
          t = Concat<axis=0>(u, rest)
          y = Reshape(x, t)
        }""",
        clean.run,
    )
    assert result.ops == ["Reshape"]
    assert shape_of(result.after.graph.outputs[0]) == (2, 12)
    assert_equal(result, "moves data only")


def test_3_where_range_constant_of_shape() -> None:
    result = rewrite(
        """g (float[1,4] x) => (float[N,4] y)
        <int64[2] s = {3,4}, int64[2] w = {-1,4}, int64 a = {0}, int64 b = {2}, int64 one = {1}> {
          r = Range(a, b, one)
          n = Shape(r)
          ones = ConstantOfShape<value=int64[1] {1}>(n)
          minus = Neg(ones)
          m = Equal(w, minus)
          t = Where(m, s, w)
          y = Expand(x, t)
        }""",
        clean.run,
    )
    assert result.ops == ["Expand"]
    assert shape_of(result.after.graph.outputs[0]) == (3, 4)


def test_5_large_results_are_not_folded() -> None:
    result = rewrite(
        """g (float[1024,512] x) => (float[1024,512] y) <float[1,512] a, int64[2] s = {1024,512}> {
          e = Expand(a, s)
          y = Add(x, e)
        }""",
        clean.run,
        a=normal(1, 512),
    )
    assert result.ops == ["Expand", "Add"]
    assert any("2 MB result is larger than its inputs" in note for note in result.notes)


def test_5_large_weights_are_folded_when_they_do_not_grow() -> None:
    result = rewrite(
        """g (float[2,1024] x) => (float[2,512] y) <float[512,1024] w> {
          t = Transpose(w)
          y = MatMul(x, t)
        }""",
        w=normal(512, 1024),
    )
    assert result.ops == ["MatMul"]


def test_5_dequantized_weights_stay() -> None:
    result = rewrite(
        """g (float[2,4] x) => (float[2,3] y) <int8[4,3] w, float s = {0.5}> {
          d = DequantizeLinear(w, s)
          y = MatMul(x, d)
        }""",
        clean.run,
        w=np.arange(12, dtype=np.int8).reshape(4, 3),
    )
    assert result.ops == ["DequantizeLinear", "MatMul"]


def test_5_random_numbers_stay() -> None:
    text = """g (float[2] x) => (float[2] y) { r = RandomNormal<shape=[2]>() y = Add(x, r) }"""
    assert "RandomNormal" in rewrite(text, fold.run).ops


def test_contradiction_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"MatMul .*: the inputs do not fit"):
        rewrite(
            "g (float[2,3] x) => (float[2,5] y) <float[4,5] w> { y = MatMul(x, w) }", w=normal(4, 5)
        )


def test_unknown_shapes_are_reported() -> None:
    from edgepipe.passes import inline, opset
    from edgepipe.passes.editor import Editor

    from .rewriting import model

    edit = Editor(model("g (float[5] x) => (int64[1,N] y) { y = NonZero(x) }"))
    inline.run(edit)
    opset.run(edit)
    assert [value.name for value in shapes.unknown(edit.model)] == ["y"]
