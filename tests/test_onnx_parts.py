"""Models whose weights lie apart compute what the file says, and nothing is copied for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe import importer
from edgepipe.onnx_parts import OnnxParts, is_apart
from edgepipe.onnx_session import open_session

SIZE = 48  # squared, of float32, above what counts as heavy


def model(weight: TensorProto) -> onnx.ModelProto:
    """y = x·w + b: a heavy initializer and a light one."""
    bias = numpy_helper.from_array(np.linspace(-1, 1, SIZE, dtype=np.float32), "b")
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
         helper.make_node("MatMul", ["x", "wide"], ["t"]),
         helper.make_node("Add", ["t", "b"], ["y"])],
        "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, SIZE])], [bias, weight],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    return made


def matrix(dtype: str = "float32") -> np.ndarray:
    random = np.random.default_rng(1).standard_normal((SIZE, SIZE)) * (2 / SIZE) ** 0.5
    return (random * 40).astype(dtype)


def load(path: Path, proto: onnx.ModelProto) -> importer.Source:
    path.write_bytes(proto.SerializeToString())
    return importer.load(path)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int8", "uint8", "int64"])
@pytest.mark.parametrize("raw", [True, False])
def test_both_parts_make_the_model_again(tmp_path: Path, dtype: str, raw: bool) -> None:
    array = matrix(dtype)
    weight = numpy_helper.from_array(array, "w")
    if not raw:
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        weight = helper.make_tensor("w", kind, array.shape, array.reshape(-1))
    source = load(tmp_path / "m.onnx", model(weight))
    by_name = {t.name: numpy_helper.to_array(t) for t in source.proto.graph.initializer}
    assert by_name.keys() == {"w", "b"}
    assert by_name["w"].dtype == array.dtype
    assert np.array_equal(by_name["w"], array)
    onnx.checker.check_model(onnx.load_from_string(source.proto_bytes()))

    x = np.random.default_rng(2).standard_normal((2, SIZE), np.float32)
    (exact,) = onnx.reference.ReferenceEvaluator(model(weight)).run(None, {"x": x})
    (y,) = open_session(source.reference).run(None, {"x": x})
    (plain,) = open_session(source.reference, relayout=False).run(None, {"x": x})
    assert np.allclose(y, exact, atol=1e-3) and np.allclose(plain, exact, atol=1e-3)
    assert not np.allclose(y, exact[:, ::-1], atol=1e-3)


def test_graph_and_reference_read_the_same_memory(tmp_path: Path) -> None:
    source = load(tmp_path / "m.onnx", model(numpy_helper.from_array(matrix(), "w")))
    constant = source.model.graph.initializers["w"].const_value
    assert constant is not None
    assert np.shares_memory(constant.numpy(), source.reference.weights["w"])
    assert not constant.numpy().flags.writeable
    assert len(source.reference.graph) < matrix().nbytes


def test_weights_live_as_long_as_a_session_reads_them(tmp_path: Path) -> None:
    proto = model(numpy_helper.from_array(matrix(), "w"))
    x = np.random.default_rng(2).standard_normal((2, SIZE), np.float32)
    (exact,) = onnx.reference.ReferenceEvaluator(proto).run(None, {"x": x})
    session = open_session(load(tmp_path / "m.onnx", proto).reference)
    spoil = [np.full((SIZE, SIZE), np.nan, np.float32) for _ in range(200)]
    (y,) = session.run(None, {"x": x})
    assert np.allclose(y, exact, atol=1e-3)
    assert np.isnan(spoil[0]).all()


def test_a_place_that_a_model_names_itself_is_not_lent(tmp_path: Path) -> None:
    """External data at the name that stands for lent weights is read as any other file."""
    proto = model(numpy_helper.from_array(matrix(), "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="apart",
              size_threshold=0)  # fmt: skip
    source = importer.load(tmp_path / "m.onnx")
    assert np.array_equal(source.reference.weights["w"], matrix())
    assert sum(is_apart(t) for t in onnx.load_from_string(source.reference.graph).graph.initializer)


def test_a_file_is_a_model_without_weights_apart() -> None:
    content = model(numpy_helper.from_array(matrix(), "w")).SerializeToString()
    assert OnnxParts.of(content).whole() == content
