"""Networks with small weights and float arithmetic, on every kind of target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edgepipe import importer, passes, pipeline, runners
from edgepipe.context import Context
from edgepipe.metrics import snr_db
from edgepipe.quantization import half
from edgepipe.recipe import Recipe
from edgepipe.target import Target

#: Float32 sums in another order, over the layers of one network.
FLOOR_DB = 100.0
#: Recipe → weights.bin over that of float32.
SIZES = {"fp16": 0.51, "w8a16": 0.27, "w4g32": 0.17}
NAMES = {"fp16": "float16", "w8a16": "int8 per channel", "w4g32": "int4 per 32 channels"}


def reference(model: Path, bundle_folder: Path, recipe: str) -> bytes:
    """The graph with the rounded weights, in float32, as ONNX."""
    if recipe != "fp16":
        (emitted,) = bundle_folder.glob("*.onnx")
        return emitted.read_bytes()
    context = Context(Target.load("host"), Recipe(recipe))
    graph = half.apply(passes.run(importer.load(model, None).model, context), context)
    return ir.serde.serialize_model(graph).SerializeToString()


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize("recipe", SIZES)
@pytest.mark.parametrize(
    "target",
    [
        "x86-64-v3",
        pytest.param("wasm-simd", marks=pytest.mark.needs_node),
        pytest.param("raspberry-pi-4", marks=pytest.mark.needs_qemu),
        pytest.param("raspberry-pi-3-32", marks=pytest.mark.needs_qemu),
    ],
)
def test_trained_network(target: str, recipe: str, shared_models: Path, tmp_path: Path) -> None:
    model = shared_models / "ic_resnet8.onnx"
    emit = [] if recipe == "fp16" else ["onnx"]
    bundle = pipeline.compile(
        model, target=target, recipe=recipe, output=tmp_path / "bundle", emit=emit
    )
    kernels = [k for k in bundle.manifest["kernels"] if k["macs"]]
    stored = {k["arithmetic"].partition("weights ")[2] for k in kernels}
    assert NAMES[recipe] in stored and "" not in stored
    floats = pipeline.compile(model, target=target, output=tmp_path / "float")
    sizes = [b.file("weights.bin").stat().st_size for b in (bundle, floats)]
    assert sizes[0] <= SIZES[recipe] * sizes[1]

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = reference(model, bundle.path, recipe)
    session = onnxruntime.InferenceSession(proto, options, ["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    x = np.random.default_rng(0).standard_normal(source.shape).astype(np.float32)
    (expected,) = session.run(None, {source.name: x})
    result = runners.run(bundle, {source.name: x})[bundle.outputs[0].name]
    assert snr_db(expected, result) > FLOOR_DB
    unrounded = runners.run(floats, {source.name: x})[floats.outputs[0].name]
    assert snr_db(expected, unrounded) < FLOOR_DB  # positive control: the float network differs


def test_halves_that_a_model_computes_are_no_error_of_its_weights(tmp_path: Path) -> None:
    """ONNX Runtime rounds every operator of a float16 model to halves; kernels round outputs."""
    rng, make = np.random.default_rng(0), onnx.helper.make_node
    weights = [(rng.standard_normal((64, 64)) / np.sqrt(32)).astype(np.float16) for _ in range(3)]
    nodes = [
        make("MatMul", ["x", "w0"], ["a"]),
        make("Softmax", ["a"], ["s"]),
        make("MatMul", ["s", "w1"], ["b"]),
        make("Tanh", ["b"], ["c"]),
        make("MatMul", ["c", "w2"], ["y"]),
    ]
    info, half_ = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT16
    tensors = [onnx.numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = onnx.helper.make_graph(
        nodes, "g", [info("x", half_, [8, 64])], [info("y", half_, [8, 64])], tensors
    )
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "m.onnx"
    )
    bundle = pipeline.compile(
        tmp_path / "m.onnx", target="host", recipe="w8a16", output=tmp_path / "b"
    )
    report = bundle.validate()
    assert not report.failures
    assert 45 < report.steps[0].snr_db < 80  # positive control: float32 would have to be nearer
