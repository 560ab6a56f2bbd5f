"""Cases of edgepipe/passes/matmul.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.passes import clean, matmul

from .rewriting import assert_equal, normal, rewrite


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", ["6", "1,6", "1", None])
def test_1_gemm(trans_a: int, trans_b: int, bias: str | None) -> None:
    x = "4,3" if trans_a else "3,4"
    w = (6, 4) if trans_b else (4, 6)
    dims = [int(d) for d in bias.split(",")] if bias else []
    declared = f", float[{bias}] c" if bias else ""
    text = f"""g (float[{x}] x) => (float[3,6] y) <float[{w[0]},{w[1]}] w{declared}> {{
      y = Gemm<transA={trans_a}, transB={trans_b}, alpha=0.5, beta=2.0>(x, w{", c" if bias else ""})
    }}"""
    weights = {"w": normal(*w)} | ({"c": normal(*dims, scale=1.0)} if bias else {})
    result = rewrite(text, matmul.run, clean.run, **weights)
    node = result.node("Gemm")
    assert dict(node.attributes).keys() <= {"transB", "beta"}
    assert result.constant("Gemm", 1).shape == (6, 4)
    if bias:
        assert result.constant("Gemm", 2).shape == (6,)
    assert_equal(result, "float32 weights rounded once more")


def test_1_one_bias_per_row_stays() -> None:
    text = """g (float[3,4] x) => (float[3,6] y) <float[4,6] w, float[3,6] c> {
      y = Gemm(x, w, c)
    }"""
    result = rewrite(text, matmul.run, w=normal(4, 6), c=normal(3, 6))
    assert "Gemm keeps a bias with one value per row" in result.notes
    assert_equal(result)


def test_2_3_matmul_and_add() -> None:
    text = """g (float[3,4] x) => (float[3,6] y) <float[4,6] w, float[6] c> {
      h = MatMul(x, w)
      y = Add(c, h)
    }"""
    result = rewrite(text, matmul.run, clean.run, w=normal(4, 6), c=normal(6))
    assert result.ops == ["Gemm"]
    assert len(result.node("Gemm").inputs) == 3
    assert_equal(result)


def test_3_other_reader_keeps_the_add() -> None:
    text = """g (float[3,4] x) => (float[3,6] y, float[3,6] h) <float[4,6] w, float[6] c> {
      h = MatMul(x, w)
      y = Add(h, c)
    }"""
    result = rewrite(text, matmul.run, clean.run, w=normal(4, 6), c=normal(6))
    assert result.ops == ["Gemm", "Add"]
    assert_equal(result)


def test_4_scalars_of_both_operands_become_one() -> None:
    text = """g (float[2,3,4] x, float[2,4,6] z) => (float[2,3,6] y)
    <float a = {0.5}, float b = {0.25}> {
      l = Mul(a, x)
      r = Mul(z, b)
      y = MatMul(l, r)
    }"""
    result = rewrite(text, matmul.run, clean.run)
    assert result.ops == ["Mul", "MatMul"]
    assert result.constant("Mul", 1) == 0.125
    assert_equal(result)


def test_4_other_reader_keeps_both() -> None:
    text = """g (float[2,3,4] x, float[2,4,6] z) => (float[2,3,6] y, float[2,4,6] r)
    <float a = {0.5}, float b = {0.25}> {
      l = Mul(a, x)
      r = Mul(z, b)
      y = MatMul(l, r)
    }"""
    result = rewrite(text, matmul.run, clean.run)
    assert result.ops == ["Mul", "Mul", "MatMul"]
    assert_equal(result)


def test_5_6_rank_3() -> None:
    text = """g (float[2,3,4] x) => (float[2,3,6] y) <float[4,6] w, float[6] c> {
      h = MatMul(x, w)
      y = Add(c, h)
    }"""
    result = rewrite(text, matmul.run, clean.run, w=normal(4, 6), c=normal(6))
    assert result.ops == ["MatMul", "Add"]
    assert result.constant("Add", 1).shape == (6,)
    assert_equal(result)


def test_integers_stay_matmul() -> None:
    text = "g (int32[3,4] x) => (int32[3,6] y) <int32[4,6] w> { y = MatMul(x, w) }"
    result = rewrite(text, matmul.run, w=np.arange(24, dtype=np.int32).reshape(4, 6))
    assert result.ops == ["MatMul"]
