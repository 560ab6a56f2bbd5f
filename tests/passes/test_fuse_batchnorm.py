"""Cases of edgepipe/passes/fuse_batchnorm.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.errors import Unsupported
from edgepipe.passes import fuse_batchnorm, identity

from .rewriting import assert_equal, execute, inputs_of, model, normal, relative_error, rewrite

BN = {
    "s": 1 + normal(8, scale=0.3),
    "b": normal(8, seed=1, scale=0.5),
    "m": normal(8, seed=2, scale=0.5),
    "v": np.abs(normal(8, seed=3, scale=0.5)) + 0.1,
}
CONV = """g (float[1,4,9,9] x) => (float[1,8,N,M] y)
<float[8,4,3,3] w, float[8] c, float[8] s, float[8] b, float[8] m, float[8] v> {
  h = Conv<pads=[1,1,1,1]>(x, w{bias})
  {between}
  y = BatchNormalization<epsilon=0.01>(h, s, b, m, v)
}"""


def conv(bias: str = "", between: str = "") -> str:
    text = CONV.replace("{bias}", bias).replace("{between}", between)
    return text if bias else text.replace("float[8] c, ", "")


@pytest.mark.parametrize("bias", ["", ", c"], ids=["without_bias", "with_bias"])
def test_1_conv(bias: str) -> None:
    weights = {"w": normal(8, 4, 3, 3), **BN, **({"c": normal(8, seed=9)} if bias else {})}
    result = rewrite(conv(bias), fuse_batchnorm.run, **weights)
    assert result.ops == ["Conv"]
    assert_equal(result, "float32 weights rounded once more")


def test_1_positive_control() -> None:
    """The comparison notices two swapped channels and one doubled scale."""
    weights = {"w": normal(8, 4, 3, 3), **BN}
    right = model(conv(), **weights)
    feeds = inputs_of(right)
    swapped = {**weights, "w": weights["w"][[1, 0, *range(2, 8)]]}
    doubled = {**weights, "s": np.where(np.arange(8) == 3, 2, 1).astype(np.float32) * BN["s"]}
    for wrong in (swapped, doubled):
        error = relative_error(execute(right, feeds), execute(model(conv(), **wrong), feeds))
        assert error > 1e-2


def test_1_across_identity() -> None:
    text = conv(between="i = Identity(h)").replace("(h, s", "(i, s")
    result = rewrite(text, identity.run, fuse_batchnorm.run, w=normal(8, 4, 3, 3), **BN)
    assert result.ops == ["Conv"]
    assert_equal(result, "float32 weights rounded once more")


@pytest.mark.parametrize("group", [1, 2])
def test_1_conv_transpose(group: int) -> None:
    result = rewrite(
        f"""g (float[1,4,5,5] x) => (float[1,8,N,M] y)
        <float[4,{8 // group},3,3] w, float[8] s, float[8] b, float[8] m, float[8] v> {{
          h = ConvTranspose<strides=[2,2], group={group}>(x, w)
          y = BatchNormalization(h, s, b, m, v)
        }}""",
        fuse_batchnorm.run,
        w=normal(4, 8 // group, 3, 3),
        **BN,
    )
    assert result.ops == ["ConvTranspose"]
    assert_equal(result, "float32 weights rounded once more")


@pytest.mark.parametrize("transposed", [0, 1])
def test_1_gemm(transposed: int) -> None:
    shape = (8, 4) if transposed else (4, 8)
    result = rewrite(
        f"""g (float[3,4] x) => (float[3,8] y)
        <float[{shape[0]},{shape[1]}] w, float[8] c,
         float[8] s, float[8] b, float[8] m, float[8] v> {{
          h = Gemm<transB={transposed}, beta=0.5>(x, w, c)
          y = BatchNormalization(h, s, b, m, v)
        }}""",
        fuse_batchnorm.run,
        w=normal(*shape),
        c=normal(8, seed=7),
        **BN,
    )
    assert result.ops == ["Gemm"]
    assert_equal(result, "float32 weights rounded once more")


def test_1_two_consumers_are_noted() -> None:
    text = conv().replace("=> (float[1,8,N,M] y)", "=> (float[1,8,N,M] y, float[1,8,N,M] z)")
    text = text.replace("y = Batch", "z = Relu(h)\n y = Batch")
    result = rewrite(text, fuse_batchnorm.run, w=normal(8, 4, 3, 3), **BN)
    assert sorted(result.ops) == ["Add", "Conv", "Mul", "Relu"]
    assert "BatchNormalization not folded: Conv output has 2 consumers" in result.notes
    assert_equal(result)


def test_1_conv_output_is_a_graph_output() -> None:
    text = conv().replace("=> (float[1,8,N,M] y)", "=> (float[1,8,N,M] y, float[1,8,N,M] h)")
    result = rewrite(text, fuse_batchnorm.run, w=normal(8, 4, 3, 3), **BN)
    assert "BatchNormalization not folded: Conv output has 2 consumers" in result.notes
    assert_equal(result)


def test_2_matmul() -> None:
    result = rewrite(
        """g (float[3,4] x) => (float[3,8] y)
        <float[4,8] w, float[8] s, float[8] b, float[8] m, float[8] v> {
          h = MatMul(x, w)
          y = BatchNormalization(h, s, b, m, v)
        }""",
        fuse_batchnorm.run,
        w=normal(4, 8),
        **{**BN, "b": np.zeros(8, np.float32), "m": np.zeros(8, np.float32)},
    )
    assert result.ops == ["MatMul"]
    assert_equal(result, "float32 weights rounded once more")


def test_3_alone() -> None:
    result = rewrite(
        """g (float[2,8,3,5] x) => (float[2,8,3,5] y)
        <float[8] s, float[8] b, float[8] m, float[8] v> {
          y = BatchNormalization(x, s, b, m, v)
        }""",
        fuse_batchnorm.run,
        **BN,
    )
    assert result.ops == ["Mul", "Add"]
    assert result.constant("Mul", 1).shape == (8, 1, 1)
    assert_equal(result)


def test_3_parameters_known_at_run_time() -> None:
    result = rewrite(
        """g (float[2,8,3,5] x, float[8] s, float[8] b) => (float[2,8,3,5] y)
        <float[8] m, float[8] v> {
          y = BatchNormalization(x, s, b, m, v)
        }""",
        fuse_batchnorm.run,
        m=BN["m"],
        v=BN["v"],
    )
    assert "BatchNormalization" not in result.ops
    assert "BatchNormalization not folded: its parameters are not constants" in result.notes
    assert_equal(result)


def test_training_mode_is_refused() -> None:
    with pytest.raises(Unsupported, match="training mode"):
        rewrite(
            """g (float[2,8,3,5] x) => (float[2,8,3,5] y)
            <float[8] s, float[8] b, float[8] m, float[8] v> {
              y, p, q = BatchNormalization<training_mode=1>(x, s, b, m, v)
            }""",
            fuse_batchnorm.run,
            **BN,
        )
