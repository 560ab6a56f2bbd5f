"""Cases of edgepipe/passes/opset.py and upgrade.py: every old form computes the same."""

from __future__ import annotations

import re

import numpy as np
import pytest

from edgepipe.errors import Unsupported
from edgepipe.passes import clean, identity
from edgepipe.passes.editor import OPSET

from .rewriting import assert_equal, model, normal, rewrite

# Opset, graph, operators afterwards.
OLD_FORMS = {
    "batch_norm_6": (
        6,
        """g (float[1,2,3,3] x) => (float[1,2,3,3] y)
        <float[2] s = {1.5,0.5}, float[2] b = {1.0,2.0},
         float[2] m = {1.5,0.5}, float[2] v = {1.0,2.0}> {
          y = BatchNormalization<is_test=1>(x, s, b, m, v)
        }""",
        ["BatchNormalization"],
    ),
    "squeeze_11": (
        11,
        "g (float[1,3,1,2] x) => (float[3,2] y) { y = Squeeze<axes=[0,2]>(x) }",
        ["Squeeze"],
    ),
    "unsqueeze_11": (
        11,
        "g (float[3,2] x) => (float[1,3,1,2] y) { y = Unsqueeze<axes=[0,2]>(x) }",
        ["Unsqueeze"],
    ),
    "reduce_sum_11": (
        11,
        "g (float[3,2] x) => (float[3] y) { y = ReduceSum<axes=[1], keepdims=0>(x) }",
        ["ReduceSum"],
    ),
    "reduce_max_13": (
        13,
        "g (float[3,2] x) => (float[1,2] y) { y = ReduceMax<axes=[0]>(x) }",
        ["ReduceMax"],
    ),
    "split_11": (
        11,
        """g (float[6,2] x) => (float[2,2] y, float[4,2] z) {
          y, z = Split<axis=0, split=[2,4]>(x)
        }""",
        ["Split"],
    ),
    "split_13_equal": (
        13,
        "g (float[6,2] x) => (float[3,2] y, float[3,2] z) { y, z = Split<axis=0>(x) }",
        ["Split"],
    ),
    "slice_9": (
        9,
        """g (float[6,5] x) => (float[3,2] y) {
          y = Slice<axes=[1,0], starts=[-3,1], ends=[-1,4]>(x)
        }""",
        ["Slice"],
    ),
    "top_k_9": (9, "g (float[6] x) => (float[2] y, int64[2] i) { y, i = TopK<k=2>(x) }", ["TopK"]),
    "clip_9": (9, "g (float[6] x) => (float[6] y) { y = Clip<min=-0.5, max=0.25>(x) }", ["Clip"]),
    "clip_9_default": (9, "g (float[6] x) => (float[6] y) { y = Clip<min=0.0>(x) }", ["Clip"]),
    "dropout_10": (
        10,
        "g (float[6] x) => (float[6] y) { h = Dropout<ratio=0.3>(x) y = Neg(h) }",
        ["Neg"],
    ),
    "pad_9": (
        9,
        "g (float[2,3] x) => (float[3,6] y) { y = Pad<pads=[1,0,0,3], value=1.5>(x) }",
        ["Pad"],
    ),
    "softmax_11_last_axis": (
        11,
        "g (float[2,5] x) => (float[2,5] y) { y = Softmax(x) }",
        ["Softmax"],
    ),
    "softmax_11_image": (
        11,
        "g (float[2,5,1,1] x) => (float[2,5,1,1] y) { y = Softmax(x) }",
        ["Softmax"],
    ),
    "softmax_11_several_axes": (
        11,
        "g (float[2,5,3] x) => (float[2,5,3] y) { y = LogSoftmax<axis=1>(x) }",
        ["Reshape", "LogSoftmax", "Reshape"],
    ),
    "upsample_9_nearest": (
        9,
        """g (float[1,2,3,4] x) => (float[1,2,6,8] y) <float[4] s = {1.0,1.0,2.0,2.0}> {
          y = Upsample<mode="nearest">(x, s)
        }""",
        ["Resize"],
    ),
    "upsample_7_linear": (
        7,
        """g (float[1,2,3,4] x) => (float[1,2,6,8] y) {
          y = Upsample<mode="linear", scales=[1.0,1.0,2.0,2.0]>(x)
        }""",
        ["Resize"],
    ),
    "resize_10_down": (
        10,
        """g (float[1,1,2,4] x) => (float[1,1,1,2] y) <float[4] s = {1.0,1.0,0.6,0.6}> {
          y = Resize<mode="nearest">(x, s)
        }""",
        ["Resize"],
    ),
    "scatter_9": (
        9,
        """g (float[3,3] x, float[1,3] u) => (float[3,3] y) <int64[1,3] i = {1,0,2}> {
          y = Scatter<axis=0>(x, i, u)
        }""",
        ["ScatterElements"],
    ),
    "grid_sample_16": (
        16,
        """g (float[1,1,4,4] x, float[1,2,2,2] f) => (float[1,1,2,2] y) {
          y = GridSample<mode="bilinear">(x, f)
        }""",
        ["GridSample"],
    ),
    "roi_align_10": (
        10,
        """g (float[1,2,8,8] x) => (float[1,2,2,2] y)
        <float[1,4] r = {1.0,1.0,6.0,5.0}, int64[1] b = {0}> {
          y = RoiAlign<output_height=2, output_width=2, sampling_ratio=2>(x, r, b)
        }""",
        ["RoiAlign"],
    ),
    "group_norm_18": (
        18,
        """g (float[1,4,3,3] x) => (float[1,4,3,3] y)
        <float[2] s = {1.5,0.5}, float[2] b = {1.0,2.0}> {
          y = GroupNormalization<num_groups=2>(x, s, b)
        }""",
        ["GroupNormalization"],
    ),
    "batch_norm_7": (
        7,
        """g (float[1,2,3,3] x) => (float[1,2,3,3] y)
        <float[2] s = {1.5,0.5}, float[2] b = {1.0,2.0},
         float[2] m = {1.5,0.5}, float[2] v = {1.0,2.0}> {
          y = BatchNormalization(x, s, b, m, v)
        }""",
        ["BatchNormalization"],
    ),
}


def test_1_broadcast_of_opset_6_starts_at_axis() -> None:
    """No runtime here computes opset 6 broadcasting: the expected value is written out."""
    from .rewriting import execute

    text = """g (float[2,3,4] x, float[3] b) => (float[2,3,4] y) {
      y = Add<broadcast=1, axis=1>(x, b)
    }"""
    x, b = normal(2, 3, 4), normal(3, seed=1)
    result = rewrite(text, opset_version=6)
    y = execute(result.after, {"x": x, "b": b})[0]
    np.testing.assert_array_equal(y, x + b[:, None])


@pytest.mark.parametrize("name", OLD_FORMS)
def test_1_old_forms(name: str) -> None:
    version, text, ops = OLD_FORMS[name]
    result = rewrite(text, identity.run, clean.run, opset_version=version)
    assert result.ops == ops
    assert result.after.opset_imports == {"": OPSET}
    assert_equal(result)


def test_1_resize_10_takes_the_right_neighbour_when_shrinking() -> None:
    """Known answer from the standard's example: [[1, 3]]."""
    from .rewriting import execute

    version, text, _ = OLD_FORMS["resize_10_down"]
    x = np.arange(1, 9, dtype=np.float32).reshape(1, 1, 2, 4)
    result = rewrite(text, opset_version=version)
    assert execute(result.after, {"x": x})[0].tolist() == [[[[1.0, 3.0]]]]


@pytest.mark.parametrize(
    ("version", "graph", "reason"),
    [
        (5, "g (float[2] x) => (float[2] y) { y = Neg(x) }", "opset 5 is not supported"),
        (9, "g (float[2] x) => (float[2] y) { y = Celu(x) }", "Celu does not exist in opset 9"),
        (
            11,
            """g (float[1,1,2,2] x) => (float[1,1,4,4] y)
            <float[0] r, float[4] s = {1.0,1.0,2.0,2.0}> {
              y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn">(x, r, s)
            }""",
            "tf_half_pixel_for_nn is not supported",
        ),
    ],
)
def test_1_refused(version: int, graph: str, reason: str) -> None:
    weights = {"r": np.zeros(0, np.float32)} if " r," in graph else {}
    with pytest.raises(Unsupported, match=reason):
        rewrite(graph, opset_version=version, **weights)


def test_custom_operators_are_refused_by_name() -> None:
    text = '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> g (float[2] x) => (float[2] y)'
    import onnx_ir as ir

    with pytest.raises(Unsupported, match=re.escape("acme.Twist is not part of standard ONNX")):
        rewrite(ir.from_onnx_text(text + " { y = acme.Twist(x) }"))


NEWER_FORMS = {
    "swish_24": (24, "g (float[9] x) => (float[9] y) { y = Swish<alpha=1.5>(x) }"),
    "cum_prod_26": (
        26,
        "g (float[3,5] x) => (float[3,5] y) <int64 a = {1}> { y = CumProd<exclusive=1>(x, a) }",
    ),
    "bit_cast_26": (26, "g (float[3] x) => (int32[3] y) { y = BitCast<to=6>(x) }"),
    "space_to_depth_28": (
        28,
        """g (float[1,2,4,6] x) => (float[1,8,2,3] y) {
          y = SpaceToDepth<blocksize=2, mode="CRD">(x)
        }""",
    ),
    "float_mod_28": (28, "g (float[9] x, float[9] z) => (float[9] y) { y = Mod(x, z) }"),
    "celu_28": (28, "g (float16[9] x) => (float16[9] y) { y = Celu<alpha=2.0>(x) }"),
    "swiglu_28": (28, "g (float[2,8] x, float[2,8] z) => (float[2,8] y) { y = SwiGLU(x, z) }"),
}


@pytest.mark.parametrize("name", NEWER_FORMS)
def test_2_newer_forms(name: str) -> None:
    version, text = NEWER_FORMS[name]
    result = rewrite(text, clean.run, opset_version=version)
    declared = result.after.opset_imports[""]
    assert declared == (26 if name == "bit_cast_26" else OPSET)
    assert_equal(result, "another formula of the same function")


def test_2_known_answer_of_float_mod() -> None:
    from .rewriting import execute

    result = rewrite(NEWER_FORMS["float_mod_28"][1], opset_version=28)
    x = np.array([5.3, -5.3, 5.3, -5.3, 6, -6, 0, 1e-3, -1e-3], np.float32)
    z = np.array([3, 3, -3, -3, 3, 3, 2, 5, 5], np.float32)
    np.testing.assert_allclose(execute(result.after, {"x": x, "z": z})[0], np.mod(x, z))


def test_3_weights_are_not_copied() -> None:
    source = model(
        "g (float[2,4] x) => (float[2,3] y) <float[4,3] w> { y = MatMul(x, w) }", w=normal(4, 3)
    )
    result = rewrite(source)
    weight = result.node("MatMul").inputs[1]
    assert weight is not None
    assert weight.const_value is source.graph.initializers["w"].const_value
