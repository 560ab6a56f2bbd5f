"""SmoothQuant: where it applies, that it changes nothing in float, that it helps outliers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import importer, passes
from edgepipe.quantization import smoothquant
from quantization.networks import build, context, quantize, run, samples, snr_db

#: A pre-norm block: only dense layers read the normalised tensor.
PRE = """n (float[1,6,16] x) => (float[1,6,8] y)
<float[16] g, float[16] h, float[16,24] w0, float[24] b0, float[24,8] w1, float[8] b1> {
    l = LayerNormalization<axis=-1>(x, g, h)
    m = MatMul(l, w0)
    a = Add(m, b0)
    r = Gelu(a)
    p = MatMul(r, w1)
    y = Add(p, b1) }"""
#: A post-norm block: the residual reads it too.
POST = """n (float[1,6,16] x) => (float[1,6,16] y)
<float[16] g, float[16] h, float[16,16] w0, float[16] b0> {
    l = LayerNormalization<axis=-1>(x, g, h)
    m = MatMul(l, w0)
    a = Add(m, b0)
    y = Add(l, a) }"""
#: Two dense layers in a row.
CHAIN = """n (float[6,16] x) => (float[6,8] y)
<float[16,24] w0, float[24] b0, float[24,8] w1> {
    m = MatMul(x, w0)
    a = Add(m, b0)
    y = MatMul(a, w1) }"""


def smoothed(model: ir.Model) -> tuple[ir.Model, str]:
    changed, said = model.clone(), []
    inputs = {changed.graph.inputs[0]: np.stack([s["x"] for s in samples(model, 8)])}
    smoothquant.smooth(changed.graph, inputs, lambda subject, text: said.append(text))
    return changed, said[0]


@pytest.mark.parametrize(
    ("text", "muls", "weights"), [(PRE, 0, ["w0"]), (POST, 1, ["w0"]), (CHAIN, 0, ["w0", "w1"])]
)
def test_the_float_function_stays(text: str, muls: int, weights: list[str]) -> None:
    model = build(text)
    changed, _ = smoothed(model)
    sample = samples(model, 1, seed=7)[0]
    assert snr_db(run(model, sample)[0], run(changed, sample)[0]) > 100
    assert sum(node.op_type == "Mul" for node in changed.graph) == muls
    for name in weights:
        assert name not in changed.graph.initializers, "it was replaced"


def test_the_comparison_can_fail() -> None:
    """Positive control: one smoothed weight undone must show."""
    model = build(PRE)
    changed, _ = smoothed(model)
    old = next(v for n, v in changed.graph.initializers.items() if n.startswith("w0"))
    old.const_value = model.graph.initializers["w0"].const_value
    sample = samples(model, 1, seed=7)[0]
    assert snr_db(run(model, sample)[0], run(changed, sample)[0]) < 40


@pytest.mark.slow
@pytest.mark.parametrize("text", [PRE, POST])
def test_outlier_channels_cost_less(text: str) -> None:
    scale = np.ones(16, np.float32)
    scale[[3, 11]] = 60
    weight = np.random.default_rng(5).standard_normal((16, 24 if text is PRE else 16)) / 4
    model = build(text, g=scale, w0=weight / scale[:, None])
    fresh = samples(model, 16, seed=8)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    found = [
        np.concatenate([run(quantize(model, methods=methods)[0], s)[0] for s in fresh])
        for methods in ((), ("smoothquant",))
    ]
    if text is POST:  # the residual itself has the outliers: judge what the dense layer adds
        reference = np.concatenate([run(model, s)[0] - residual(model, s) for s in fresh])
        found = [f - expected + reference for f in found]
        expected = reference
    assert snr_db(expected, found[1]) > snr_db(expected, found[0]) + 6


def residual(model: ir.Model, sample: dict[str, np.ndarray]) -> np.ndarray:
    probe = model.clone()
    probe.graph.outputs.extend(
        n.outputs[0] for n in probe.graph if n.op_type == "LayerNormalization"
    )
    return run(probe, sample)[1]


def test_dead_channels_and_no_place() -> None:
    scale, shift = np.ones(16, np.float32), np.zeros(16, np.float32)
    scale[2] = 0
    changed, text = smoothed(build(PRE, g=scale, h=shift))
    assert text.startswith("1 tensors")
    for value in changed.graph.initializers.values():
        assert np.isfinite(value.const_value.numpy().astype(float)).all()
    lonely = build("n (float[2,4] x) => (float[2,3] y) <float[4,3] w> { y = MatMul(x, w) }")
    assert smoothed(lonely)[1].startswith("0 tensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text-transformer", "vit-tiny"])
def test_transformers_compute_the_same(name: str) -> None:
    model = passes.run(importer.load(name, None).model, context())
    changed = model.clone()
    generator = np.random.default_rng(0)

    def sample() -> dict[str, np.ndarray]:
        return {
            v.name: generator.integers(1, 2 if "mask" in v.name else 1000, tuple(v.shape))
            if v.dtype == ir.DataType.INT64
            else np.float32(generator.standard_normal(tuple(v.shape)))
            for v in model.graph.inputs
        }

    held = [sample() for _ in range(3)]
    inputs = {v: np.stack([s[v.name] for s in held]) for v in changed.graph.inputs}
    said: list[str] = []
    smoothquant.smooth(changed.graph, inputs, lambda subject, text: said.append(text))
    assert int(said[0].split()[0]) >= 4
    fresh = sample()
    assert snr_db(run(model, fresh)[0], run(changed, fresh)[0]) > 100
