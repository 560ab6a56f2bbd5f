"""Cases of edgepipe/passes/decompose.py and the rewrite_*.py files."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.passes import clean, decompose, identity

from .rewriting import Rewritten, assert_equal, execute, inputs_of, normal, relative_error, rewrite

FORMULA = "another formula of the same function"
PASSES = (decompose.run, identity.run, clean.run)


def test_native_operators_stay() -> None:
    text = "g (float[2,4] x) => (float[2,4] y) { y = HardSwish(x) }"
    assert rewrite(text, *PASSES).ops == ["HardSwish"]


# Opset, graph, operators that must be gone.
DECOMPOSED = {
    "mvn": (13, "g (float[2,3,4,5] x) => (float[2,3,4,5] y) { y = MeanVarianceNormalization(x) }"),
    "affine_grid": (
        20,
        """g (float[1,2,3] x) => (float[1,3,4,2] y) <int64[4] s = {1,1,3,4}> {
          y = AffineGrid(x, s)
        }""",
    ),
    "rotary": (
        23,
        """g (float[1,2,3,4] x) => (float[1,2,3,4] y) <float[8,2] c, float[8,2] s,
        int64[1,3] p = {0,3,2}> { y = RotaryEmbedding(x, c, s, p) }""",
    ),
    "col2im": (
        18,
        """g (float[2,12,4] x) => (float[2,3,A,B] y)
        <int64[2] image = {5,6}, int64[2] block = {2,2}> {
          y = Col2Im<strides=[2,3], pads=[0,1,1,0], dilations=[2,1]>(x, image, block)
        }""",
    ),
    "dft": (
        20,
        """g (float[2,3,10,1] x) => (float[A,B,C,2] y) <int64 axis = {2}> {
          y = DFT(x, , axis)
        }""",
    ),
    "dft_onesided_padded": (
        20,
        """g (float[2,10,3,1] x) => (float[A,B,C,2] y) <int64 n = {16}, int64 axis = {1}> {
          y = DFT<onesided=1>(x, n, axis)
        }""",
    ),
    "dft_inverse": (
        20,
        """g (float[2,10,2] x) => (float[A,B,2] y) <int64 axis = {1}> {
          y = DFT<inverse=1>(x, , axis)
        }""",
    ),
    "dft_17": (17, "g (float[2,10,1] x) => (float[A,B,2] y) { y = DFT<axis=1>(x) }"),
    "stft": (
        17,
        """g (float[2,64,1] x) => (float[2,A,B,2] y) <int64 step = {8}, float[16] w> {
          y = STFT(x, step, w)
        }""",
    ),
    "bit_shift": (
        11,
        'g (uint8[9] x, uint8[9] z) => (uint8[9] y) { y = BitShift<direction="LEFT">(x, z) }',
    ),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_2_3_decomposed(name: str) -> None:
    version, text = DECOMPOSED[name]
    weights = {}
    if name == "rotary":
        angle = np.outer(np.arange(8), [1, 0.3]).astype(np.float32)
        weights = {"c": np.cos(angle), "s": np.sin(angle)}
    if name == "stft":
        weights = {"w": np.hanning(16).astype(np.float32)}
    result = rewrite(text, *PASSES, opset_version=version, **weights)
    original = {node.op_type for node in result.before.graph}
    assert name == "bit_shift" or not original & set(result.ops)
    assert_equal(result, FORMULA)


def test_2_shift_by_the_width_and_more_is_zero() -> None:
    result = rewrite(DECOMPOSED["bit_shift"][1], *PASSES, opset_version=11)
    x, z = np.full(9, 255, np.uint8), np.arange(9, dtype=np.uint8)
    expected = np.array([255 << n & 255 for n in range(9)], np.uint8)
    np.testing.assert_array_equal(execute(result.after, {"x": x, "z": z})[0], expected)


@pytest.mark.parametrize(
    "text",
    [
        "g (float[1,0,4,2] x) => (float[1,A,4,2] y) { y = DFT<axis=1>(x) }",
        "g (float[1,0,4,2] x) => (float[1,A,4,2] y) { y = DFT<axis=1, inverse=1>(x) }",
        "g (float[1,1,4,2] x) => (float[A,B,4,1] y) { y = DFT<axis=1, inverse=1, onesided=1>(x) }",
    ],
)
def test_2_transforms_of_nothing_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="a Fourier transform of 0 samples"):
        rewrite(text, *PASSES, opset_version=17)


def test_2_unknown_sizes_are_noted() -> None:
    text = "g (float[2,10,1] x, int64 n) => (float[A,B,2] y) { y = DFT(x, n) }"
    from edgepipe.passes import inline, opset
    from edgepipe.passes.editor import Editor

    from .rewriting import model

    notes: list[str] = []
    edit = Editor(model(text, 20), lambda subject, reason: notes.append(reason))
    for step in (inline.run, opset.run, decompose.run):
        step(edit)
    assert [n.op_type for n in edit.model.graph] == ["DFT"]
    assert "DFT kept: its length or axis is not constant" in notes


# Inputs, call; q heads 4 or 2·groups, sequence 3, keys 5, size 8.
ATTENTION = {
    "plain": ("float[2,4,3,8] q, float[2,4,5,8] k, float[2,4,5,6] v", "Attention(q, k, v)"),
    "rank_3": (
        "float[2,3,32] q, float[2,5,32] k, float[2,5,24] v",
        "Attention<q_num_heads=4, kv_num_heads=4>(q, k, v)",
    ),
    "grouped": ("float[2,4,3,8] q, float[2,2,5,8] k, float[2,2,5,6] v", "Attention(q, k, v)"),
    "grouped_rank_3_causal": (
        "float[2,5,32] q, float[2,5,16] k, float[2,5,12] v",
        "Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(q, k, v)",
    ),
    "scaled_softcap": (
        "float[2,4,3,8] q, float[2,4,5,8] k, float[2,4,5,6] v",
        "Attention<scale=0.2, softcap=1.5>(q, k, v)",
    ),
    "float_mask": (
        "float[2,4,3,8] q, float[2,4,5,8] k, float[2,4,5,6] v, float[3,5] m",
        "Attention(q, k, v, m)",
    ),
    "bool_mask_causal": (
        "float[2,4,3,8] q, float[2,4,5,8] k, float[2,4,5,6] v, bool[2,1,3,5] m",
        "Attention<is_causal=1>(q, k, v, m)",
    ),
}


def decomposed_attention(name: str) -> Rewritten:
    inputs, call = ATTENTION[name]
    rank = "A,B,C" if "rank_3" in name else "A,B,C,D"
    text = f"g ({inputs}) => (float[{rank}] y) {{ y = {call} }}"
    return rewrite(text, *PASSES, opset_version=23)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, seed: int) -> None:
    result = decomposed_attention(name)
    assert "Attention" not in result.ops
    assert "MatMul" in result.ops
    _same_as_reference(result, seed)


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_attention_3_5_cache_and_debug_output(mode: int) -> None:
    # The reference evaluator applies the softcap to mode 0 too; the standard does not.
    cap = ", softcap=2.0" if mode else ""
    text = f"""g (float[2,4,1,8] q, float[2,4,1,8] k, float[2,4,1,6] v, float[1,6] m,
      float[2,4,5,8] pk, float[2,4,5,6] pv)
      => (float[A,B,C,D] y, float[A,B,E,F] nk, float[A,B,E,D] nv, float[A,B,C,E] qk) {{
      y, nk, nv, qk = Attention<qk_matmul_output_mode={mode}{cap}>(q, k, v, m, pk, pv)
    }}"""
    result = rewrite(text, *PASSES, opset_version=23)
    assert "Attention" not in result.ops
    _same_as_reference(result, 0)


@pytest.mark.parametrize("mode", [-1, 4, 1 << 32])
def test_attention_outputs_that_there_are_not(mode: int) -> None:
    with pytest.raises(UserError, match=f"qk_matmul_output_mode is {mode}, not 0 to 3"):
        rewrite(
            f"""g (float[1,2,3,4] q, float[1,2,3,4] k) => (float[1,2,3,4] y) {{
              y = Attention<qk_matmul_output_mode={mode}>(q, k, k)
            }}""",
            *PASSES,
            opset_version=23,
        )


def test_attention_2_keys_are_not_repeated() -> None:
    result = decomposed_attention("grouped")
    assert not {"Expand", "Tile", "Gather", "Concat"} & set(result.ops)


def test_attention_6_fully_masked_rows_are_zero() -> None:
    result = decomposed_attention("bool_mask_causal")
    feeds = inputs_of(result.before)
    feeds["m"][:] = True
    feeds["m"][1, :, 2] = False
    y = execute(result.after, feeds)[0]
    assert np.isfinite(y).all()
    assert not y[1, :, 2].any()
    assert y[0, :, 2].any()


def test_attention_6_causal_needs_no_guard() -> None:
    result = decomposed_attention("grouped_rank_3_causal")
    assert "Where" not in result.ops


def _same_as_reference(result: Rewritten, seed: int) -> None:
    """Against the reference evaluator: ONNX Runtime differs where rows are fully masked."""
    import onnx_ir as ir
    from onnx.reference import ReferenceEvaluator

    feeds = inputs_of(result.before, seed)
    expected = ReferenceEvaluator(ir.serde.serialize_model(result.before)).run(None, feeds)
    error = relative_error(expected, execute(result.after, feeds))
    assert error <= 5e-6, f"relative error {error:.2e}"


def test_positive_control() -> None:
    """A causal mask shifted by one key is noticed."""
    result = decomposed_attention("grouped_rank_3_causal")
    for value in result.after.graph.initializers.values():
        array = value.const_value.numpy()
        if np.isneginf(array).any():
            import onnx_ir as ir

            shifted = np.roll(array, 1, axis=-1)
            value.const_value = ir.tensor(shifted, name=value.name)
    with pytest.raises(AssertionError, match="relative error"):
        _same_as_reference(result, 0)


def test_weights_of_a_function_body() -> None:
    """GRU-like text models are not touched; their weights stay shared."""
    text = "g (float[2,4] x) => (float[2,3] y) <float[4,3] w> { h = MatMul(x, w) y = Relu(h) }"
    result = rewrite(text, *PASSES, w=normal(4, 3))
    assert result.ops == ["MatMul", "Relu"]
