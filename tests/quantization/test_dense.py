"""Transformer blocks: biases and scalars join integer operators; the function stays."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.quantization import QuantConfig, dense
from quantization.networks import build, quantize, run, samples, snr_db

#: A dense layer with a function behind it, attention with a scaled query, and a residual.
BLOCK = """n (float[1,6,16] x) => (float[1,6,16] y, float[1,6,24] q)
<float[16,24] w0, float[24] b0, float[24,16] w1, float[16] b1,
 float c = {0.25}> {
    m = MatMul(x, w0)
    q = Add(m, b0)
    r = Gelu(q)
    s = Mul(r, c)
    t = Transpose<perm=[0,2,1]>(q)
    z = MatMul(s, t)
    p = Softmax<axis=-1>(z)
    v = MatMul(p, q)
    o = MatMul(v, w1)
    a = Add(o, b1)
    e = Relu(a)
    y = Add(x, e) }"""


def kinds(model: object) -> list[str]:
    return [node.op_type for node in model.graph]  # type: ignore[attr-defined]


def test_the_float_function_stays() -> None:
    model = build(BLOCK)
    changed = model.clone()
    said: list[str] = []
    dense.rewrite(changed.graph, QuantConfig.parse("w8a8"), lambda subject, text: said.append(text))
    assert kinds(changed).count("Gemm") == 2
    assert kinds(changed).count("Add") == 1, "the residual's"
    names = kinds(changed)
    assert names.index("Relu") == [i for i, n in enumerate(names) if n == "Gemm"][1] + 1
    assert said == ["2 dense layers take their bias into the accumulator"]
    product = next(n for n in changed.graph if n.op_type == "MatMul")
    assert [use.node.op_type for use in product.outputs[0].uses()] == ["Mul"]
    for before, after in zip(
        *(run(m, samples(model, 1, 7)[0]) for m in (model, changed)), strict=True
    ):
        assert snr_db(before, after) > 110


def test_a_wrong_bias_shows() -> None:
    model = build(BLOCK)
    other = build(BLOCK, b1=np.full(16, 0.3))
    sample = samples(model, 1, seed=7)[0]
    dense.rewrite(other.graph, QuantConfig.parse("w8a8"), lambda subject, text: None)
    assert snr_db(run(model, sample)[0], run(other, sample)[0]) < 40


def test_nothing_but_normalisation_computes_in_float() -> None:
    model = build(BLOCK)
    quantized, used = quantize(model)
    said = [note.text for note in used.notes if "computes in float" in note.text]
    assert {text.split()[0] for text in said} == {"Softmax", "Mul"}
    sample = samples(model, 1, seed=7)[0]
    assert snr_db(run(model, sample)[0], run(quantized, sample)[0]) > 25


@pytest.mark.parametrize("override", [("MatMul", "float"), ("MatMul", "w4a8")])
def test_an_override_of_matmul_keeps_it(override: tuple[str, str]) -> None:
    changed = build(BLOCK)
    config = QuantConfig.parse("w8a8", overrides=(override,))
    dense.rewrite(changed.graph, config, lambda subject, text: None)
    assert "Gemm" not in kinds(changed)
