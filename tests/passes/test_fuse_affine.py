"""Cases of edgepipe/passes/fuse_affine.py and fuse_input.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.passes import fuse_affine, fuse_input

from .rewriting import assert_equal, normal, rewrite

LINEAR = {
    "conv": ("float[1,4,7,7] x", "float[6,4,3,3]", "Conv<pads=[1,1,1,1]>(x, w)", (6, 1, 1)),
    "transposed": (
        "float[1,4,7,7] x",
        "float[4,3,2,2]",
        "ConvTranspose<strides=[2,2], group=2>(x, w)",
        (6, 1, 1),
    ),
    "gemm": ("float[5,4] x", "float[4,6]", "Gemm(x, w)", (6,)),
}


def after(linear: str, operation: str) -> tuple[str, dict[str, np.ndarray]]:
    inputs, weight, call, shape = LINEAR[linear]
    dims = ",".join(str(d) for d in shape)
    rank = "N,M" if linear == "gemm" else "N,M,K,L"
    text = f"""g ({inputs}) => (float[{rank}] y) <{weight} w, float[{dims}] k> {{
      h = {call}
      y = {operation}
    }}"""
    sizes = [int(d) for d in weight[6:-1].split(",")]
    return text, {"w": normal(*sizes), "k": 1 + normal(*shape, scale=0.3)}


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize(
    "operation", ["Mul(h, k)", "Mul(k, h)", "Div(h, k)", "Add(h, k)", "Sub(h, k)", "Sub(k, h)"]
)
def test_1_2_folded(linear: str, operation: str) -> None:
    text, weights = after(linear, operation)
    result = rewrite(text, fuse_affine.run, **weights)
    assert len(result.ops) == 1
    assert_equal(result, "float32 weights rounded once more")


def test_1_division_by_the_result_stays() -> None:
    text, weights = after("conv", "Div(k, h)")
    assert rewrite(text, fuse_affine.run, **weights).ops == ["Conv", "Div"]


def test_1_not_per_channel_is_noted() -> None:
    text, weights = after("conv", "Mul(h, k)")
    text = text.replace("float[6,1,1] k", "float[1,1,7] k")
    result = rewrite(text, fuse_affine.run, **{**weights, "k": normal(1, 1, 7)})
    assert result.ops == ["Conv", "Mul"]
    assert "Mul not folded: its constant is not one value per channel" in result.notes


def test_1_broadcast_that_grows_the_result_stays() -> None:
    result = rewrite(
        """g (float[1,4] x) => (float[5,6] y) <float[4,6] w, float[5,6] k> {
          h = Gemm(x, w)
          y = Add(h, k)
        }""",
        fuse_affine.run,
        w=normal(4, 6),
        k=normal(5, 6),
    )
    assert result.ops == ["Gemm", "Add"]


def test_3_matmul() -> None:
    result = rewrite(
        """g (float[2,5,4] x) => (float[2,5,6] y) <float[4,6] w, float s> {
          h = MatMul(x, w)
          y = Mul(h, s)
        }""",
        fuse_affine.run,
        w=normal(4, 6),
        s=np.float32(0.125),
    )
    # Of rank 3: the product is kept apart, only matrices of rank 2 are scaled.
    assert result.ops in (["MatMul"], ["MatMul", "Mul"])
    assert_equal(result)


INPUT = """g (float[1,4,7,7] x) => (float[1,6,N,M] y)
<float[6,W,3,3] w, float[4,1,1] k, float[4,1,1] d> {
  a = Sub(x, k)
  b = Div(a, d)
  y = Conv<group=G, pads=[P,P,P,P]>(b, w)
}"""


@pytest.mark.parametrize("group", [1, 2])
def test_input_1_2_normalisation(group: int) -> None:
    text = INPUT.replace("G", str(group)).replace("W", str(4 // group)).replace("P", "0")
    weights = {
        "w": normal(6, 4 // group, 3, 3),
        "k": normal(4, 1, 1),
        "d": 1 + abs(normal(4, 1, 1)),
    }
    result = rewrite(text, fuse_input.run, **weights)
    assert result.ops == ["Conv"]
    assert_equal(result, "float32 weights rounded once more")


def test_input_2_padding_keeps_the_shift() -> None:
    text = INPUT.replace("G", "1").replace("W", "4").replace("P", "1")
    weights = {"w": normal(6, 4, 3, 3), "k": normal(4, 1, 1), "d": 1 + abs(normal(4, 1, 1))}
    result = rewrite(text, fuse_input.run, **weights)
    assert result.ops == ["Sub", "Conv"]
    assert any("pads with zeros" in note for note in result.notes)
    assert_equal(result, "float32 weights rounded once more")


@pytest.mark.parametrize("call", ["Gemm<alpha=0.5, beta=2.0>(b, w, c)", "Gemm<transB=1>(b, v, c)"])
def test_input_1_2_gemm(call: str) -> None:
    name = "w" if "w" in call else "v"
    shape = (4, 6) if name == "w" else (6, 4)
    result = rewrite(
        f"""g (float[3,4] x) => (float[3,6] y)
        <float[{shape[0]},{shape[1]}] {name}, float[6] c, float[4] k, float[1] s> {{
          a = Mul(s, x)
          b = Add(a, k)
          y = {call}
        }}""",
        fuse_input.run,
        c=normal(6),
        k=normal(4, seed=3),
        s=np.array([0.25], np.float32),
        **{name: normal(*shape)},
    )
    assert result.ops == ["Gemm"]
    assert_equal(result, "float32 weights rounded once more")
