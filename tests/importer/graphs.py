"""Small ONNX models for the importer's tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[int | str] | None


def value(name: str, dims: Dims, element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, dims)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def relu(dims: Dims = (1, 4), **keyword: int) -> onnx.ModelProto:
    """x → Relu → y."""
    node = helper.make_node("Relu", ["x"], ["y"], "relu")
    return model([node], [value("x", dims)], [value("y", dims)], **keyword)


def weight(name: str, shape: tuple[int, ...], seed: int = 0) -> onnx.TensorProto:
    array = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return numpy_helper.from_array(array, name)


def dense(dims: Dims = (1, 4)) -> onnx.ModelProto:
    """x [n,4] → MatMul with w [4,3] → y [n,3]."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "dense")
    rows = None if dims is None else dims[0]
    return model([node], [value("x", dims)], [value("y", [rows, 3])], [weight("w", (4, 3))])


def save(proto: onnx.ModelProto, folder: Path, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def externalise(proto: onnx.ModelProto, folder: Path, location: str = "m.data") -> bytes:
    """Move all initializers to ``location`` (written if it is a plain name); the file's bytes."""
    content = b""
    for tensor in proto.graph.initializer:
        raw = tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (
            ("location", location),
            ("offset", str(len(content))),
            ("length", str(len(raw))),
        ):
            tensor.external_data.add(key=key, value=text)
        content += raw
    if "/" not in location and "\\" not in location:
        (folder / location).write_bytes(content)
    return content
