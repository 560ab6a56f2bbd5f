"""Cases of edgepipe/passes/quantized.py, and that no pass takes a Q/DQ pattern apart."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import version_converter

from edgepipe import importer, passes
from edgepipe.context import Context
from edgepipe.passes import clean, quantized
from edgepipe.recipe import Recipe
from edgepipe.target import Target

from .rewriting import Rewritten, assert_equal, execute, inputs_of, relative_error, rewrite

MOVES_ONLY = "moves data only"


def codes(*shape: int, limit: int = 127) -> np.ndarray:
    generator = np.random.default_rng(len(shape))
    return generator.integers(-limit, limit + 1, shape).astype(np.int8)


def test_1_zero_points_are_written_out() -> None:
    result = rewrite(
        """g (float[2,4] x) => (float[2,4] y) <float s = {0.1}> {
          q = QuantizeLinear(x, s)
          y = DequantizeLinear(q, s)
        }""",
        quantized.run,
    )
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        zero = result.constant(kind, 2)
        assert (zero.dtype, zero.shape, int(zero)) == (np.uint8, (), 0)
    assert_equal(result, MOVES_ONLY)


@pytest.mark.parametrize(
    ("weight", "scale", "move", "expected_axis"),
    [
        ("int8[4,6]", "float", "Transpose(d)", None),
        ("int8[4,6]", "float[4]", "Transpose<perm=[1,0]>(d)", 1),
        ("int8[2,2,6]", "float[6]", "Reshape(d, target)", 1),
        ("int8[4,1,6]", "float[4]", "Reshape(d, target)", 0),
        ("int8[4,6]", "float[4]", "Identity(d)", 0),
    ],
)
def test_2_moves_go_onto_the_codes(
    weight: str, scale: str, move: str, expected_axis: int | None
) -> None:
    shape = [int(d) for d in weight[5:-1].split(",")]
    axis = shape.index(int(scale[6:-1])) if "[" in scale else 1
    text = f"""g (float[3,N] x) => (float[3,M] y)
        <{weight} w, {scale} s, int64[2] target = {{4, 6}}> {{
          d = DequantizeLinear<axis={axis}>(w, s)
          t = {move}
          y = MatMul(x, t)
        }}"""
    rows = 6 if "Transpose" in move else 4
    text = text.replace("float[3,N]", f"float[3,{rows}]").replace("[3,M]", f"[3,{10 - rows}]")
    steps = 0.01 * np.arange(1, 1 + (shape[axis] if "[" in scale else 1), dtype=np.float32)
    result = rewrite(
        text, quantized.run, clean.run, w=codes(*shape), s=steps if "[" in scale else steps[0]
    )
    assert result.ops == ["DequantizeLinear", "MatMul"]
    if expected_axis is not None:
        assert result.node("DequantizeLinear").attributes.get_int("axis", 1) == expected_axis
    assert_equal(result, MOVES_ONLY)


def test_2_blocks_move_along() -> None:
    result = rewrite(
        """g (float[3,8] x) => (float[3,4] y) <int8[4,8] w, float[4,2] s> {
          d = DequantizeLinear<axis=1, block_size=4>(w, s)
          t = Transpose(d)
          y = MatMul(x, t)
        }""",
        quantized.run,
        clean.run,
        opset_version=21,
        w=codes(4, 8),
        s=np.linspace(0.01, 0.1, 8, dtype=np.float32).reshape(4, 2),
    )
    assert result.ops == ["DequantizeLinear", "MatMul"]
    assert result.constant("DequantizeLinear", 1).shape == (2, 4)
    assert_equal(result, MOVES_ONLY)


def test_2_a_reshape_that_mixes_scales_stays() -> None:
    result = rewrite(
        """g (float[3,8] x) => (float[3,3] y) <int8[4,6] w, float[4] s, int64[2] t = {8, 3}> {
          d = DequantizeLinear<axis=0>(w, s)
          r = Reshape(d, t)
          y = MatMul(x, r)
        }""",
        quantized.run,
        w=codes(4, 6),
        s=np.ones(4, np.float32),
    )
    assert "Reshape" in result.ops
    assert "Reshape of dequantised weights mixes their scales" in result.notes


def convolution(bias: np.ndarray, scale: float = 0.02) -> Rewritten:
    return rewrite(
        f"""g (float[1,3,5,5] x) => (float[1,4,3,3] y)
        <int8[4,3,3,3] w, float[4] s, float[4] b, float sx = {{{scale}}}, uint8 zx = {{128}}> {{
          q = QuantizeLinear(x, sx, zx)
          d = DequantizeLinear(q, sx, zx)
          f = DequantizeLinear<axis=0>(w, s)
          y = Conv(d, f, b)
        }}""",
        quantized.run,
        w=codes(4, 3, 3, 3),
        s=np.float32([0.01, 0.02, 0.03, 0.04]),
        b=bias,
    )


def test_3_a_float_bias_becomes_codes() -> None:
    bias = np.float32([0.5, -1.0, 2.0, 0.0])
    result = convolution(bias)
    assert result.ops.count("DequantizeLinear") == 3
    restored = result.node("Conv").inputs[2].producer()
    scale, held = (restored.inputs[i].const_value.numpy() for i in (1, 0))
    assert held.dtype == np.int32
    assert np.array_equal(scale, np.float32(0.02) * np.float32([0.01, 0.02, 0.03, 0.04]))
    assert np.all(np.abs(held * scale - bias) <= 0.5 * scale)
    feeds = inputs_of(result.before)
    expected, got = (execute(model, feeds) for model in (result.before, result.after))
    assert np.abs(got[0] - expected[0]).max() <= scale.max()
    wrong = convolution(bias * np.float32(1.01)).after  # the check above can fail
    assert np.abs(execute(wrong, feeds)[0] - expected[0]).max() > scale.max()


def test_3_a_bias_beyond_int32_stays() -> None:
    result = convolution(np.float32([1e9, 0, 0, 0]))
    assert result.node("Conv").inputs[2].const_value is not None
    assert "its float bias does not fit int32 on the product's scale" in result.notes


def test_3_a_float_convolution_keeps_its_bias() -> None:
    result = rewrite(
        "g (float[1,3,5,5] x) => (float[1,4,3,3] y) <float[4,3,3,3] w, float[4] b> "
        "{ y = Conv(x, w, b) }",
        quantized.run,
        w=codes(4, 3, 3, 3).astype(np.float32),
        b=np.ones(4, np.float32),
    )
    assert result.ops == ["Conv"]


# -- whole models as onnxruntime.quantization writes them --------------------------------------

NETWORK = """
network (float[1, 3, 12, 12] x) => (float[1, 5] y)
<float[8,3,3,3] w0, float[8] b0, float[8,8,1,1] w1, float[12,5] w2, float[5] b2,
 float[4,8,3,3] w3, float[4] b3, int64[2] flat = {1, 12}> {
    c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
    r0 = Relu(c0)
    c1 = Conv(r0, w1)
    g1 = Sigmoid(c1)
    s1 = Mul(c1, g1)
    s = Add(r0, s1)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(s)
    c3 = Conv<pads=[1,1,1,1]>(m, w3, b3)
    k = Concat<axis=1>(c3, m)
    g = GlobalAveragePool(k)
    f = Reshape(g, flat)
    h = MatMul(f, w2)
    y = Add(h, b2)
}
"""


class _Samples:
    """Calibration data as quantize_static reads them."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.left = [generator.standard_normal((1, 3, 12, 12)).astype(np.float32)] * 4

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {"x": self.left.pop()} if self.left else None


def quantized_file(folder: Path, **options: object) -> Path:
    from onnxruntime.quantization import QuantFormat, quantize_static

    generator = np.random.default_rng(0)
    tensors = [
        ir.tensor((generator.standard_normal(shape) * 0.3).astype(np.float32), name=name)
        for name, shape in {
            "w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 1, 1), "w2": (12, 5), "b2": (5,),
            "w3": (4, 8, 3, 3), "b3": (4,),
        }.items()
    ]  # fmt: skip
    header = '<ir_version: 10, opset_import: ["" : 21]>\n'
    proto = ir.serde.serialize_model(ir.from_onnx_text(header + NETWORK, initializers=tensors))
    onnx.save(version_converter.convert_version(proto, 21), folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "q.onnx", _Samples(), QuantFormat.QDQ, **options
    )
    return folder / "q.onnx"


@pytest.mark.parametrize("case", ["per channel", "signed", "unsigned weights", "4-bit weights"])
def test_no_pass_takes_a_pattern_apart(tmp_path: Path, case: str) -> None:
    from onnxruntime.quantization import QuantType

    options = {
        "per channel": {"per_channel": True, "weight_type": QuantType.QInt8},
        "signed": {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8},
        "unsigned weights": {
            "activation_type": QuantType.QUInt8,
            "weight_type": QuantType.QUInt8,
        },
        "4-bit weights": {"per_channel": True, "weight_type": QuantType.QInt4},
    }[case]
    source = importer.load(quantized_file(tmp_path, **options))
    context = Context(Target.load("host"), Recipe())
    graph = passes.run(source.model, context)
    before, after = (Counter(n.op_type for n in m.graph) for m in (source.model, graph))
    assert before["QuantizeLinear"] > 10
    for kind in ("QuantizeLinear", "DequantizeLinear", "Conv", "MatMul", "Sigmoid", "Concat"):
        assert after[kind] == before[kind], kind
    feeds = inputs_of(source.model)
    expected = execute(source.model, feeds)
    assert relative_error(expected, execute(graph, feeds)) == 0.0
    coarse = graph.clone()
    for value in coarse.graph.initializers.values():
        if value.name.startswith("w0") and "scale" in value.name:
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.1))
    assert relative_error(expected, execute(coarse, feeds)) > 1e-3  # equality can fail
