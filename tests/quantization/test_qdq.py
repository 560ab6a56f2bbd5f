"""The quantized graph: valid ONNX, right types and scales, near the float one, same in integers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe import quantize as quantize_stage
from edgepipe.onnx_session import open_session
from edgepipe.quantization.interpreter import Interpreter
from quantization.networks import MIXED, build, quantize, run, samples, snr_db

#: Least SNR against the float network, by recipe, measured with 3 dB to spare.
LEAST_SNR_DB = {"w8a8": 30.0, "w4a8": 15.0, "w4a4": 5.0, "w8a16": 38.0, "w4g2": 15.0}


def constant(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


def codes_of(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codes of every quantized tensor by ONNX Runtime, from the dequantized values."""
    probe = model.clone()
    pairs = [n for n in probe.graph if n.op_type == "DequantizeLinear" and len(n.inputs) > 2]
    probe.graph.outputs.extend(n.outputs[0] for n in pairs if not n.outputs[0].is_graph_output())
    found = dict(zip([v.name for v in probe.graph.outputs], run(probe, feeds), strict=True))
    return {
        n.inputs[0].name: np.rint(found[n.outputs[0].name] / constant(n.inputs[1])).astype(int)
        + int(constant(n.inputs[2]))
        for n in pairs
    }


@pytest.mark.parametrize("recipe", LEAST_SNR_DB)
def test_it_is_valid_runs_and_is_near(recipe: str) -> None:
    model = build(MIXED)
    result, _ = quantize(model, recipe)
    onnx.checker.check_model(ir.serde.serialize_model(result), full_check=True)
    fresh = samples(model, 16, seed=9)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    plain = np.concatenate([run(result, s)[0] for s in fresh])
    optimised = np.concatenate([run(result, s, optimise=True)[0] for s in fresh])
    assert snr_db(expected, plain) > LEAST_SNR_DB[recipe]
    assert snr_db(plain, optimised) > LEAST_SNR_DB[recipe]


@pytest.mark.slow
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4"])
def test_integers_agree_with_onnx_runtime(recipe: str, signed: bool, fuse: bool) -> None:
    model = build(MIXED)
    result, _ = quantize(
        model, recipe, signed_activations=signed, fuse_residual=fuse, quantize_outputs=True
    )
    interpreter = Interpreter(result)
    total = within = equal = 0
    for sample in samples(model, 8, seed=5):
        trace = {v.name: x for v, x in interpreter.trace(sample).items()}
        for name, codes in codes_of(result, sample).items():
            difference = np.abs(codes - trace[name])
            total += difference.size
            within += int((difference <= 1).sum())
            equal += int((difference == 0).sum())
    assert interpreter.floats == []
    assert within >= 0.999 * total
    assert equal >= 0.99 * total


def test_the_comparison_can_fail() -> None:
    """Positive control: one doubled weight scale must show in the codes."""
    model = build(MIXED)
    result, _ = quantize(model)
    sample = samples(model, 1, seed=5)[0]
    before = codes_of(result, sample)
    scale = next(
        v
        for n, v in result.graph.initializers.items()
        if n.startswith("w1/") and n.endswith("/scale")
    )
    scale.const_value = ir.tensor(constant(scale) * 2, name=scale.name)
    trace = {v.name: x for v, x in Interpreter(result).trace(sample).items()}
    wrong = [n for n, c in before.items() if (np.abs(c - trace[n]) > 1).mean() > 0.01]
    assert wrong


def test_types_and_granularity() -> None:
    model = build(MIXED)
    result, _ = quantize(model, "w4a8")
    types = Counter()
    for node in result.graph:
        if node.op_type == "QuantizeLinear":
            assert constant(node.inputs[1]).ndim == 0, "activations are per tensor"
        if node.op_type in ("Conv", "Gemm"):
            weight, bias = node.inputs[1].producer(), node.inputs[2].producer()
            source = node.inputs[0].producer()
            types[str(weight.inputs[0].dtype)] += 1
            assert constant(weight.inputs[1]).ndim == 1
            product = constant(source.inputs[1]) * constant(weight.inputs[1])
            np.testing.assert_array_equal(product, constant(bias.inputs[1]))
            assert bias.inputs[0].dtype == ir.DataType.INT32
    assert types == {"INT8": 3, "INT4": 2}, "first, depthwise and last layers keep 8 bits"
    assert "w1" not in result.graph.initializers, "float weights are dropped"


def extremes(model: ir.Model) -> list[tuple[str, int]]:
    """Type and largest magnitude of every weight's codes."""
    weights = [
        n.inputs[1].producer().inputs[0] for n in model.graph if n.op_type in ("Conv", "Gemm")
    ]
    return [(str(w.dtype), int(np.abs(constant(w).astype(np.int32)).max())) for w in weights]


@pytest.mark.parametrize("methods", [(), ("mean_variance",), ("reconstruction",)])
@pytest.mark.parametrize("limit", [63, 127])
def test_eight_bit_weights_keep_to_their_limit(limit: int, methods: tuple[str, ...]) -> None:
    result, _ = quantize(build(MIXED), weight_limit=limit, methods=methods)
    found = [peak for _, peak in extremes(result)]
    assert max(found) == limit and min(found) > 0.8 * limit


def test_the_limit_is_none_of_four_bits_business() -> None:
    model = quantize(build(MIXED), "w4a8", weight_limit=63)[0]
    found = extremes(model)
    assert [peak for kind, peak in found if kind == "INT8"] == [127, 63, 127], "ends keep all codes"
    assert {peak for kind, peak in found if kind == "INT4"} == {8}


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_signed_activations_reach_the_graph(recipe: str) -> None:
    result, _ = quantize(build(MIXED), recipe, signed_activations=True, quantize_outputs=True)
    pairs = [n for n in result.graph if n.op_type == "QuantizeLinear"]
    readers = [n for n in result.graph if n.op_type == "DequantizeLinear"]
    assert {n.outputs[0].dtype for n in pairs} == {ir.DataType.INT8}
    assert {n.inputs[2].dtype for n in pairs} == {ir.DataType.INT8}
    assert not any(n.inputs[0].dtype == ir.DataType.UINT8 for n in readers)
    lowest = min(int(constant(n.inputs[2])) for n in pairs)
    assert lowest == (-128 if recipe == "w8a8" else -8), "behind a Relu, zero is the lowest code"


def test_the_input_model_stays() -> None:
    model = build(MIXED)
    before = str(model)
    quantize(model, "w4a8", methods=("equalization", "reconstruction"))
    assert str(model) == before


def test_the_same_twice() -> None:
    model = build(MIXED)
    first, second = quantize(model, "w4a8")[0], quantize(model, "w4a8")[0]
    a, b = (ir.serde.serialize_model(m).SerializeToString() for m in (first, second))
    assert a == b


def test_a_quantized_output_keeps_its_name() -> None:
    result, _ = quantize(build(MIXED), quantize_outputs=True)
    (output,) = result.graph.outputs
    assert output.name == "y" and output.producer().op_type == "DequantizeLinear"


def test_matmul_gets_its_bias() -> None:
    model = build(
        """n (float[4, 8] x) => (float[4, 6] y) <float[8,16] w0, float[16,6] w1> {
        a = MatMul(x, w0)
        r = Relu(a)
        y = MatMul(r, w1) }"""
    )
    result, _ = quantize(model)
    sample = samples(model, 1, seed=7)[0]
    assert snr_db(run(model, sample)[0], run(result, sample)[0]) > 30
    found = Interpreter(result).run(sample)["y"]
    assert snr_db(run(result, sample)[0], found) > 60


def test_a_scalar_index_takes_its_axis_away() -> None:
    model = build(
        """n (float[1, 5, 8] x) => (float[1, 6] y) <float[8,16] w0, float[16,6] w1, float[6] b,
        int64 first = {0}> {
        a = MatMul(x, w0)
        g = Gather<axis=1>(a, first)
        y = Gemm(g, w1, b) }"""
    )
    result, _ = quantize(model)
    sample = samples(model, 1, seed=7)[0]
    expected = run(result, sample)[0]
    assert snr_db(run(model, sample)[0], expected) > 30
    assert snr_db(expected, Interpreter(result).run(sample)["y"]) > 60


def test_a_scalar_input_is_calibrated() -> None:
    model = build(
        """n (float[1, 8] x, float s) => (float[1, 6] y) <float[8,6] w0, float[6,6] w1> {
        a = MatMul(x, w0)
        b = Mul(a, s)
        y = MatMul(b, w1) }"""
    )
    result, _ = quantize(model)
    sample = samples(model, 1, seed=7)[0]
    assert snr_db(run(model, sample)[0], Interpreter(result).run(sample)["y"]) > 25


def test_an_output_left_out_is_none_of_the_others() -> None:
    model = build(
        """n (float[5, 1, 8] x) => (float[1, 1, 6] y)
        <float[1,12,8] w, float[1,12,3] r, float[3,6] w1> {
        all, last = LSTM<hidden_size=3>(x, w, r)
        y = MatMul(last, w1) }"""
    )
    result, _ = quantize(model)
    sample = samples(model, 1, seed=7)[0]
    assert snr_db(run(result, sample)[0], Interpreter(result).run(sample)["y"]) > 60


@pytest.mark.parametrize(
    "operator",
    [
        "p = GlobalLpPool<p=3>(a)",
        "p = RoiAlign<output_height=1, output_width=1>(a, boxes, numbers)",
    ],
)
def test_operators_that_onnx_runtime_has_in_older_forms_only(operator: str) -> None:
    boxes = {"boxes": np.float32([[0.5, 0.5, 3, 3.5]])} if "boxes" in operator else {}
    declared = "float[1,4] boxes, int64[1] numbers = {0}" if boxes else "int64 unused = {0}"
    model = build(
        f"""n (float[1, 3, 6, 6] x) => (float[1, 5, 1, 1] y)
        <float[4,3,3,3] w0, float[5,4,1,1] w1, {declared}> {{
        a = Conv(x, w0)
        {operator}
        y = Conv(p, w1) }}""",
        **boxes,
    )
    result, _ = quantize(model)
    sample = samples(model, 1, seed=7)[0]
    session = open_session(quantize_stage.onnx_bytes(result))
    (expected,) = session.run(None, sample)
    assert snr_db(expected, Interpreter(result).run(sample)["y"]) > 60


def test_what_is_interpolated_is_moved_unrounded() -> None:
    model = build(
        """n (float[1, 3, 6, 8] x) => (float[1, 4, 6, 4] first, float[1, 4, 6, 2] second,
        float[1, 2, 6, 8] y) <float[4,3,1,1] w0, float[2,4,1,1] w1, float[4] scales,
         int64[2] parts = {4, 2}> {
        a = Conv(x, w0)
        r = Resize<mode="linear", coordinate_transformation_mode="asymmetric">(a, , scales)
        first, second = Split<axis=3>(r, parts)
        y = Conv(a, w1) }""",
        scales=np.float32([1, 1, 1, 0.75]),
    )
    result, _ = quantize(model)
    sample = samples(model, 1, seed=7)[0]
    found = Interpreter(result).run(sample)
    for name, expected in zip(("first", "second"), run(result, sample)[:2], strict=True):
        assert snr_db(expected, found[name]) > 60
