"""Small networks to train and what they can learn."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgepipe.quantization import QuantConfig
from edgepipe.quantization.finetune import FinetuneSettings, run
from quantization.networks import MIXED, build, context, samples

Data = tuple[np.ndarray, np.ndarray]

#: A residual pair of convolutions, small enough to train in a second.
SMALL = """
network (float[1, 3, 8, 8] x) => (float[1, 4] y)
<float[6,3,3,3] w0, float[6] b0, float[6,6,3,3] w1, float[6] b1, float[4,6] w2, float[4] b2,
 int64[2] flat = {1, 6}> {
    c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
    r0 = Relu(c0)
    c1 = Conv<pads=[1,1,1,1]>(r0, w1, b1)
    s = Add(r0, c1)
    r1 = Relu(s)
    g = GlobalAveragePool(r1)
    f = Reshape(g, flat)
    y = Gemm<transB=1>(f, w2, b2)
}
"""


def learnable(model: ir.Model, count: int = 128) -> Data:
    """Inputs, and the classes that a network of the same form but other weights sees in them."""
    x = np.concatenate([s["x"] for s in samples(model, count)])
    text = SMALL if model.graph.inputs[0].shape[2] == 8 else MIXED
    logits = outputs(build(text, seed=11), x)[0]
    return x, (logits - logits.mean(0)).argmax(1)


def outputs(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    """Every output [N, …] of a model with one input, sample by sample, without optimisations."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    found = [session.run(None, {given.name: x[i : i + 1]}) for i in range(len(x))]
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def tune(
    model: ir.Model, recipe: str | None, data: tuple, **settings: object
) -> tuple[ir.Model, list[str]]:
    """The fine-tuned model, and the lines of progress."""
    used, lines = context(), []
    object.__setattr__(used, "progress", lines.append)
    config = None if recipe is None else QuantConfig.parse(recipe)
    chosen = FinetuneSettings(**{"epochs": 4, "batch": 16, "learning_rate": 0.02, **settings})
    return run(model, config, data, chosen, used), lines


def losses(lines: list[str]) -> list[float]:
    """Of every epoch."""
    return [float(line.rpartition(" ")[2]) for line in lines if "loss" in line]


def content(model: ir.Model) -> bytes:
    """Every bit of a model."""
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True)
