"""Small networks as ONNX text, canonical, with samples; and how to run and quantize them."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgepipe import passes, quantization
from edgepipe.context import Context
from edgepipe.quantization import QuantConfig
from edgepipe.recipe import Recipe
from edgepipe.target import Target

Array = np.ndarray

#: Every pattern that convolutional networks are made of.
MIXED = """
network (float[1, 3, 12, 12] x) => (float[1, 5] y)
<float[8,3,3,3] w0, float[8] b0, float[8,1,3,3] w1, float[8] b1, float[8,8,1,1] w2, float[8] b2,
 float[4,8,1,1] w3, float[4] b3, float[12,5] w4, float[5] b4,
 int64[2] flat = {1, 12}, float lo = {0.0}, float hi = {6.0}> {
    c0 = Conv<pads=[1,1,1,1]>(x, w0, b0)
    r0 = Relu(c0)
    c1 = Conv<pads=[1,1,1,1], group=8>(r0, w1, b1)
    r1 = Clip(c1, lo, hi)
    c2 = Conv(r1, w2, b2)
    s = Add(r0, c2)
    r2 = Relu(s)
    m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r2)
    a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(m)
    c3 = Conv(a, w3, b3)
    k = Concat<axis=1>(c3, m)
    g = GlobalAveragePool(k)
    f = Reshape(g, flat)
    y = Gemm(f, w4, b4)
}
"""


def context() -> Context:
    return Context(Target.load("host"), Recipe())


def build(text: str, seed: int = 0, **replaced: Array) -> ir.Model:
    """Parse, fill declared float weights with He-like numbers (or ``replaced``), canonicalise."""
    generator = np.random.default_rng(seed)
    declared = text[text.index("<") :].split(">", 1)[0]
    tensors = []
    for dims, name in re.findall(r"float\[([\d,]+)\] (\w+)", declared):
        shape = tuple(int(d) for d in dims.split(","))
        spread = np.sqrt(2 / int(np.prod(shape[1:]))) if len(shape) > 1 else 0.1
        array = replaced.get(name, generator.standard_normal(shape) * spread)
        tensors.append(ir.tensor(np.asarray(array, np.float32), name=name))
    header = '<ir_version: 10, opset_import: ["" : 21]>\n'
    model = ir.from_onnx_text(header + text, initializers=tensors)
    return passes.run(model, context())


def samples(model: ir.Model, count: int = 24, seed: int = 1) -> list[dict[str, Array]]:
    """Smooth random inputs: neighbours correlate as in images."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        sample = {}
        for value in model.graph.inputs:
            shape = tuple(int(d) for d in value.shape)
            x = np.asarray(generator.standard_normal(shape))
            neighbours = np.roll(x, 1, -1) if shape else x
            sample[value.name] = np.asarray(x + neighbours, np.float32)
        found.append(sample)
    return found


def run(model: ir.Model, feeds: dict[str, Array], optimise: bool = False) -> list[Array]:
    """Run in ONNX Runtime, graph optimisations off or on."""
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    return session.run(None, feeds)


def quantize(model: ir.Model, recipe: str = "w8a8", **changes: object) -> tuple[ir.Model, Context]:
    """Quantize with ``samples``; the context holds the notes."""
    used = context()
    config = QuantConfig.parse(recipe, **changes)
    return quantization.apply(model, config, samples(model), used), used


def snr_db(reference: Array, result: Array) -> float:
    noise = np.sum((result.astype(np.float64) - reference) ** 2)
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / max(noise, 1e-30)))
