"""ONNX Runtime as a reference: integer kernels where they compute what the model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from test_quantize import dense

from edgepipe import onnx_session
from edgepipe.onnx_parts import OnnxParts
from edgepipe.onnx_session import known_opset, open_session
from edgepipe.passes import editor


def uses_integer_kernels(model: bytes) -> bool:
    return onnx_session._integer_kernels_are_exact(OnnxParts.of(model))


@pytest.mark.parametrize(
    ("operators", "opset"),
    [
        (["Conv", "Relu"], 23),
        (["Conv", "BitCast"], 26),
        (["RoiAlign"], 21),
        (["RoiAlign", "BitCast"], 26),
        (["NoSuch"], 23),
        ([], 23),
    ],
)
def test_operators_are_told_of_the_version_that_has_them(operators: list[str], opset: int) -> None:
    assert known_opset(operators) == opset
    assert onnx_session.OPSET == editor.OPSET


@pytest.mark.parametrize("vnni", [True, False])
def test_saturating_sums_are_avoided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool
) -> None:
    monkeypatch.setattr(onnx_session, "_sums_are_exact", lambda: vnni)
    proto = onnx.load(dense(tmp_path / "dense.onnx"))  # weights up to 127
    assert uses_integer_kernels(proto.SerializeToString()) is vnni
    codes = proto.graph.initializer[0]
    halved = numpy_helper.to_array(codes) // 4
    codes.CopyFrom(numpy_helper.from_array(halved, codes.name))
    assert uses_integer_kernels(proto.SerializeToString())


def test_dequantised_weights_leave_float_activations_alone(tmp_path: Path) -> None:
    path = dense(tmp_path / "dense.onnx", rounds=False)
    proto = onnx.load(path)
    assert not uses_integer_kernels(path.read_bytes())
    arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    weight = arrays["codes"].astype(np.float64) * arrays["scales"]
    x = np.random.default_rng(0).standard_normal((1, 8)).astype(np.float32)
    (y,) = open_session(path.read_bytes()).run(None, {"x": x})
    np.testing.assert_allclose(y, x @ weight, rtol=1e-5, atol=1e-5)


def test_float_weights_between_roundings_stay_float() -> None:
    """ONNX Runtime left to itself rounds such a weight to 8 bits."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((4, 3, 1, 1)).astype(np.float32)
    pair = [("QuantizeLinear", "DequantizeLinear")] * 2
    nodes = [
        helper.make_node(pair[0][0], ["x", "s", "z"], ["xq"]),
        helper.make_node(pair[0][1], ["xq", "s", "z"], ["xr"]),
        helper.make_node("Conv", ["xr", "w"], ["c"]),
        helper.make_node(pair[1][0], ["c", "t", "z"], ["cq"]),
        helper.make_node(pair[1][1], ["cq", "t", "z"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(weight, "w"),
        numpy_helper.from_array(np.float32(0.03), "s"),
        numpy_helper.from_array(np.float32(0.03), "t"),
        numpy_helper.from_array(np.uint8(128), "z"),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 5, 5])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 5, 5])], tensors,
    )  # fmt: skip
    opset = helper.make_opsetid("", 21)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    x = generator.standard_normal((1, 3, 5, 5)).astype(np.float32)

    def expected(weight: np.ndarray) -> np.ndarray:
        rounded = np.clip(np.rint(x / np.float32(0.03)), -128, 127) * 0.03
        exact = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0].astype(np.float64), rounded)
        return np.clip(np.rint(exact / 0.03), -128, 127)

    (y,) = open_session(model).run(None, {"x": x})
    assert not uses_integer_kernels(model)
    codes = np.rint(y / 0.03)
    assert np.mean(codes == expected(weight)) > 0.98
    step = np.abs(weight).max() / 127
    assert np.mean(codes == expected(np.rint(weight / step) * step)) < 0.95


def test_a_model_that_its_optimizations_break_is_computed_as_it_stands() -> None:
    """ONNX Runtime 1.31 makes a Gemm of MatMul and Add, and gives the reshape in front of it a pair
    of Q/DQ with the wrong type of zero point."""
    generator = np.random.default_rng(0)
    codes = generator.integers(-9, 9, (1, 16)).astype(np.int8)
    tensors = [
        numpy_helper.from_array(codes, "codes"),
        numpy_helper.from_array(np.full(16, 0.1, np.float32), "scales"),
        numpy_helper.from_array(np.arange(16, dtype=np.float32), "bias"),
        numpy_helper.from_array(np.float32(0.02), "s"),
        numpy_helper.from_array(np.int8(3), "z"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["r"]),
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=1),
        helper.make_node("MatMul", ["r", "w"], ["m"]),
        helper.make_node("Add", ["m", "bias"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, [4, 7, 3, 1])],
        [value("y", TensorProto.FLOAT, [4, 7, 3, 16])], tensors,
    )  # fmt: skip
    opset = helper.make_opsetid("", 23)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    x = generator.standard_normal((4, 7, 3, 1)).astype(np.float32)
    (y,) = open_session(model).run(None, {"x": x})
    rounded = np.clip(np.rint(x / np.float32(0.02)) + 3, -128, 127) * 0.02 - 0.06
    expected = rounded @ (codes * 0.1) + np.arange(16)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
