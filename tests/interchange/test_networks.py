"""Trained networks as .tflite files: LiteRT against ONNX Runtime on the Q/DQ graph and the float
model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from quantization.networks import Array, context, run, samples, snr_db

from edgepipe import importer, passes, quantization
from edgepipe.interchange import tflite
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.interpreter import Interpreter
from interchange.litert import Program, output_scale

pytestmark = [pytest.mark.needs_litert, pytest.mark.needs_shared, pytest.mark.slow]

#: Network → largest distance of LiteRT from ONNX Runtime on the same graph, in steps of the
#: output. ONNX Runtime sums the graph's float values, so that ties turn out differently from
#: integers; deep networks pass such a step on, and a last layer with large weights multiplies it.
STEPS = {
    "ad_autoencoder": 1,
    "cifar_resnet20": 2,
    "ic_resnet8": 2,
    "ic_resnet8_large": 2,
    "kws_dscnn": 2,
    "mobilenet_v2_224": 12,
    "squeezenet_v1_0_sparse": 4,
    "vww_mobilenetv1_025": 3,
}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(shared_models: Path, name: str, split: str, count: int) -> list[dict[str, Array]]:
    """CIFAR images preprocessed for ``name``; ``images("…", "train5000")`` calibrate."""
    with np.load(shared_models.parent / "data" / f"cifar10_{split}.npz") as data:
        x = data["images"][:count].transpose(0, 3, 1, 2).astype(np.float32)
    if name == "cifar_resnet20":
        mean, deviation = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (MEAN, DEVIATION))
        x = (x / 255 - mean) / deviation
    return [{"x": np.ascontiguousarray(image[None])} for image in x]


def inputs(
    shared_models: Path, name: str, model: ir.Model, split: str, count: int
) -> list[dict[str, Array]]:
    """Images where there are any, smooth noise elsewhere."""
    if "resnet" in name:
        return images(shared_models, name, split, count)
    return samples(model, count, seed=1 if split == "train5000" else 2)


def load(shared_models: Path, name: str) -> ir.Model:
    return passes.run(importer.load(shared_models / f"{name}.onnx").model, context())


def quantized(shared_models: Path, name: str, model: ir.Model) -> ir.Model:
    config = tflite.config(QuantConfig.parse("w8a8", methods=(), observer="minmax"))
    calibration = inputs(shared_models, name, model, "train5000", 32)
    return quantization.apply(model, config, calibration, context())


@pytest.mark.parametrize("name", STEPS)
def test_it_agrees_with_onnx_runtime(name: str, shared_models: Path) -> None:
    model = load(shared_models, name)
    graph = quantized(shared_models, name, model)
    program = Program(tflite.write(graph))
    assert program.float_between_integers() == []
    assert program.wholly_delegated()
    fresh = inputs(shared_models, name, model, "val2000", 16)
    expected = np.concatenate([run(graph, sample)[0] for sample in fresh])
    found = np.concatenate([program.run(sample)[0] for sample in fresh])
    off = np.abs(found - expected) / output_scale(graph)
    assert off.max() < STEPS[name] + 0.01
    assert np.sqrt((off**2).mean()) < STEPS[name] / 3


@pytest.mark.parametrize(
    ("name", "share"),
    # XNNPACK adds with integer multipliers: its sums of two tensors round a little differently.
    [("ad_autoencoder", 1.0), ("kws_dscnn", 0.98), ("ic_resnet8", 0.9), ("cifar_resnet20", 0.75)],
)
def test_it_computes_what_the_integers_say(name: str, share: float, shared_models: Path) -> None:
    """XNNPACK rounds as the integer interpreter does, in float32 and ties to even."""
    model = load(shared_models, name)
    graph = quantized(shared_models, name, model)
    program, interpreter = Program(tflite.write(graph)), Interpreter(graph)
    output = model.graph.outputs[0].name
    fresh = inputs(shared_models, name, model, "val2000", 8)
    expected = np.concatenate([interpreter.run(sample)[output] for sample in fresh])
    found = np.concatenate([program.run(sample)[0] for sample in fresh])
    off = np.abs(found - expected) / output_scale(graph)
    assert off.max() < 1.01 and (off < 0.5).mean() >= share


@pytest.mark.parametrize("name", ["ic_resnet8", "ic_resnet8_large", "cifar_resnet20"])
def test_it_agrees_with_the_float_network(name: str, shared_models: Path) -> None:
    model = load(shared_models, name)
    program = Program(tflite.write(quantized(shared_models, name, model)))
    fresh = images(shared_models, name, "val2000", 100)
    expected = np.concatenate([run(model, sample)[0] for sample in fresh])
    found = np.concatenate([program.run(sample)[0] for sample in fresh])
    assert snr_db(expected, found) > 24
    assert (expected.argmax(1) == found.argmax(1)).mean() >= 0.94


def test_a_graph_quantized_elsewhere(shared_models: Path, tmp_path: Path) -> None:
    """ONNX Runtime's own quantizer, uint8 activations: its scales are kept."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    feeds = iter(images(shared_models, "ic_resnet8", "train5000", 16))

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, Array] | None:
            return next(feeds, None)

    path = tmp_path / "quantized.onnx"
    quantize_static(
        str(shared_models / "ic_resnet8.onnx"), str(path), Reader(),
        quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    graph = passes.run(importer.load(path).model, context())
    program = Program(tflite.write(graph))
    assert program.wholly_delegated()
    for sample in images(shared_models, "ic_resnet8", "val2000", 8):
        off = np.abs(program.run(sample)[0] - run(graph, sample)[0]) / output_scale(graph)
        assert off.max() < STEPS["ic_resnet8"] + 0.01


def test_two_outputs_behind_floats(shared_models: Path) -> None:
    """A detector: boxes are decoded in float behind the last integer operator."""
    model = load(shared_models, "ultraface_rfb320")
    graph = quantized(shared_models, "ultraface_rfb320", model)
    program = Program(tflite.write(graph))
    assert program.float_between_integers() == []
    assert {"EXP", "SOFTMAX", "DIV"} <= {*program.kinds}
    (sample,) = samples(model, 1, seed=2)
    for expected, found in zip(run(graph, sample), program.run(sample), strict=True):
        assert snr_db(expected, found) > 30


def test_the_comparison_can_fail(shared_models: Path) -> None:
    """Positive control: two channels of one weight swapped in the file's graph."""
    model = load(shared_models, "ic_resnet8")
    graph = quantized(shared_models, "ic_resnet8", model)
    (sample,) = images(shared_models, "ic_resnet8", "val2000", 1)
    expected = run(graph, sample)[0]
    node = [n for n in graph.graph if n.op_type == "Conv"][4]
    codes = node.inputs[1].producer().inputs[0]
    swapped = codes.const_value.numpy().copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    codes.const_value = ir.tensor(swapped, name=codes.name)
    off = np.abs(Program(tflite.write(graph)).run(sample)[0] - expected) / output_scale(graph)
    assert off.max() > STEPS["ic_resnet8"] + 1
