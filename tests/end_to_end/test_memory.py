"""What compiling takes grows with a model's weights by no more than the copies it needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

#: Bytes of peak memory per byte of weights: the original's, the graph's, which is another array
#: where a pass transposed it, and the bundle's; each copy too many is 1 more.
MOST_COPIES = 3.5
SIZE = 1536


def network(layers: int) -> onnx.ModelProto:
    """Dense layers of 1536 x 1536, He-initialised."""
    random = np.random.default_rng(0)
    scale = np.float32((2 / SIZE) ** 0.5)
    weights = [
        numpy_helper.from_array(random.standard_normal((SIZE, SIZE), np.float32) * scale, f"w{i}")
        for i in range(layers)
    ]
    nodes, name = [], "x"
    for i in range(layers):
        nodes += [helper.make_node("MatMul", [name, f"w{i}"], [f"d{i}"]),
                  helper.make_node("Relu", [f"d{i}"], [f"r{i}"])]  # fmt: skip
        name = f"r{i}"
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, SIZE])], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def peak_bytes(folder: Path, layers: int, repository: Path) -> int:
    """Peak memory of compiling ``layers`` of them, self-check included."""
    model, usage = folder / f"{layers}.onnx", folder / "usage.json"
    onnx.save(network(layers), model)
    words = [sys.executable, "-S", str(repository / "benchmarks" / "rusage.py"), str(usage),
             sys.executable, "-m", "edgepipe", "compile", str(model), "--target", "x86-64-v3",
             "--quiet", "-o", str(folder / f"b{layers}")]  # fmt: skip
    subprocess.run(words, check=True)
    measured = json.loads(usage.read_text(encoding="utf-8"))
    assert measured["code"] == 0
    return int(measured["peak_bytes"])


@pytest.mark.slow
def test_weights_are_not_copied_over_and_over(tmp_path: Path, repository: Path) -> None:
    few, many = 1, 11
    grown = peak_bytes(tmp_path, many, repository) - peak_bytes(tmp_path, few, repository)
    copies = grown / ((many - few) * 4 * SIZE**2)
    assert 1 < copies < MOST_COPIES, copies
