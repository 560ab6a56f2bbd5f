"""Observers, scales, the closed-form solver and the integer operators, each against its law."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepipe.quantization import activation_aware, gptq, integer_ops, reconstruction, scales
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.interpreter import Sum, Term, requantize
from edgepipe.quantization.observers import BINS, GridStyle, Histogram, choose
from edgepipe.quantization.scales import CodeRange
from quantization.networks import run

FOUR = CodeRange.of(4)


def histogram(*arrays: np.ndarray) -> Histogram:
    result = Histogram()
    for array in arrays:
        result.add(np.asarray(array, np.float32))
    return result


def test_growing_a_histogram_loses_nothing() -> None:
    generator = np.random.default_rng(0)
    small, large = generator.uniform(-1, 1, 5000), generator.uniform(-9, 9, 5000)
    grown = histogram(small, large)
    assert grown.counts.sum() == 10000
    assert grown.counts.size == BINS
    width = 2 * grown.reach / BINS
    mean = float(grown.counts @ grown.centres) / 10000
    assert abs(mean - np.concatenate([small, large]).mean()) < width


@pytest.mark.parametrize("observer", ["minmax", "average", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_is_exact_on_every_grid(observer: str, bits: int) -> None:
    generator = np.random.default_rng(1)
    for signed in (False, True):
        for low, high in ((-3, 5), (0, 2), (-4, -1), (1, 2)):
            seen = histogram(generator.uniform(low, high, 4000))
            grid = choose(seen, observer, GridStyle(bits, signed), 99.9)
            assert grid.values(grid.codes(np.zeros(1)))[0] == 0.0
            assert grid.low <= grid.zero_point <= grid.high


def test_minmax_covers_and_others_cut_outliers() -> None:
    generator = np.random.default_rng(2)
    values = np.concatenate([generator.standard_normal(20000), [50.0, -40.0]])
    seen, style = histogram(values), GridStyle(4)
    reach = {
        name: float(choose(seen, name, style, 99.9).scale) * 15
        for name in ("minmax", "percentile", "mse", "entropy")
    }
    assert reach["minmax"] == pytest.approx(90.0, rel=1e-6)
    assert max(reach["percentile"], reach["mse"], reach["entropy"]) < 30.0


def test_mse_is_the_best_of_all_in_its_own_measure() -> None:
    generator = np.random.default_rng(3)
    values = (generator.standard_normal(30000) ** 3).astype(np.float32)
    seen, style = histogram(values), GridStyle(4)
    errors = {
        name: float(((choose(seen, name, style, 99.9).round(values) - values) ** 2).mean())
        for name in ("minmax", "percentile", "mse", "entropy")
    }
    assert errors["mse"] == min(errors.values())


def test_symmetric_grids_centre_their_zero() -> None:
    seen = histogram(np.linspace(-1, 4, 100))
    assert choose(seen, "minmax", GridStyle(8, True, True), 100).zero_point == 0
    assert choose(seen, "minmax", GridStyle(8, False, True), 100).zero_point == 128


def problem(seed: int, k: int = 24, outputs: int = 6) -> tuple[np.ndarray, Gram, np.ndarray]:
    generator = np.random.default_rng(seed)
    mixing = generator.standard_normal((k, k)) * 0.6 + np.eye(k)
    x = (generator.standard_normal((1, 4000, k)) @ mixing + 0.5).astype(np.float32)
    weight = generator.standard_normal((1, outputs, k)).astype(np.float32)
    gram = Gram(1, outputs, k)
    gram.add(x, x @ weight.transpose(0, 2, 1))
    return weight, gram, x


def loss(weight: np.ndarray, solved: np.ndarray, gram: Gram) -> float:
    d = (solved - weight).astype(np.float64)
    return float(np.einsum("gok,gkl,gol->", d, gram.hessian, d))


@pytest.mark.parametrize("span", [FOUR, CodeRange.of(8, 63), CodeRange.of(8)])
def test_reconstruction_beats_rounding(span: CodeRange) -> None:
    weight, gram, _ = problem(0)
    scale = scales.least_error(weight, span)
    rounded = scales.quantize(weight, scale, span) * scale
    codes, fitted, bias = reconstruction.solve(weight, gram, span)
    assert codes.min() >= span.low and codes.max() <= span.high
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert loss(weight, codes * fitted, gram) < 0.75 * loss(weight, rounded, gram)
    mean = np.einsum("gok,gk->go", codes * fitted, gram.mean_x) + bias
    np.testing.assert_allclose(mean, gram.mean_y, rtol=1e-5, atol=1e-5)


def test_coordinate_descent_never_grows_the_loss() -> None:
    weight, gram, _ = problem(1)
    hessian = gptq.regularised(gram).astype(np.float32)
    scale = scales.least_error(weight, FOUR)
    codes = scales.quantize(weight, scale, FOUR)
    before = loss(weight, codes * scale, gram)
    for _ in range(3):
        codes = reconstruction.descend(codes, weight, hessian, scale, FOUR)
        after = loss(weight, codes * scale, gram)
        assert after <= before * 1.001
        before = after


def test_inverse_factor() -> None:
    _, gram, _ = problem(2)
    hessian = gptq.regularised(gram)
    factor = gptq.inverse_factor(hessian).astype(np.float64)
    np.testing.assert_allclose(
        factor.transpose(0, 2, 1) @ factor, np.linalg.inv(hessian), rtol=1e-3, atol=1e-5
    )
    assert np.array_equal(factor, np.triu(factor))


def test_looking_behind_a_relu_helps_there() -> None:
    weight, gram, x = problem(3)
    wanted = x @ weight.transpose(0, 2, 1) - 2.0
    gram = Gram(1, weight.shape[1], weight.shape[2])
    gram.add(x, wanted)
    rows = activation_aware.Rows(x, wanted, None, 0.0, np.inf)

    def error(solution: gptq.Solution) -> float:
        return float(rows.error(rows.output(solution)).sum())

    for solver in (reconstruction.solve, gptq.solve):
        aware = activation_aware.solve(solver, weight, gram, FOUR, rows)
        assert error(aware) < error(solver(weight, gram, FOUR))


def test_gram_survives_a_large_mean() -> None:
    generator = np.random.default_rng(4)
    x = (generator.standard_normal((1, 5000, 6)) + 3000).astype(np.float32)
    gram = Gram(1, 2, 6)
    for part in np.array_split(x, 5, axis=1):
        gram.add(part, part[:, :, :2])
    np.testing.assert_allclose(gram.hessian[0], np.cov(x[0].T.astype(float), bias=True), atol=2e-3)
    np.testing.assert_allclose(gram.cross[0], gram.hessian[0, :2], atol=2e-3)


def test_requantisation_by_hand() -> None:
    scale = np.float32(0.5)
    half = Sum((Term(np.array([1, 3, 5, -1, 1000, -1000], np.int32), np.float32(0.25)),))
    # 0.5, 1.5, 2.5, −0.5 on the grid: ties go to the even neighbour; the ends saturate.
    assert requantize(half, scale, 10, 0, 255).tolist() == [10, 12, 12, 10, 255, 0]
    cut = Sum(half.terms, 0.0, 0.75)
    assert requantize(cut, scale, 10, 0, 255).tolist() == [10, 12, 12, 10, 12, 10]


CONV = """n (float{x} x, float{w} w) => (float[] y) {{
    y = {op}<group={g}, pads=[{p},{p},{q},{q}], strides=[{s},{s}], dilations=[{d},{d}]>(x, w) }}"""


@settings(max_examples=40, deadline=None)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose"]), g=st.sampled_from([1, 2, 4]),
    k=st.integers(1, 3), p=st.integers(0, 1), q=st.integers(0, 1), s=st.integers(1, 2),
    d=st.integers(1, 2), seed=st.integers(0, 99),
)  # fmt: skip
def test_integer_convolutions_are_exact(
    op: str, g: int, k: int, p: int, q: int, s: int, d: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    x = generator.integers(-255, 256, (1, 4, 7, 6)).astype(np.int32)
    shape = (8, 4 // g, k, k) if op == "Conv" else (4, 8 // g, k, k)
    w = generator.integers(-127, 128, shape).astype(np.int32)
    if op == "ConvTranspose" and (k == 1 and p + q > 0):
        p = q = 0
    text = CONV.format(x=list(x.shape), w=list(shape), op=op, g=g, p=p, q=q, s=s, d=d)
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
    # Products below 2^24 in total: float32 is exact.
    (expected,) = run(model, {"x": x.astype(np.float32), "w": w.astype(np.float32)})
    node = model.graph[0]
    node.outputs[0].shape = ir.Shape(expected.shape)
    function = integer_ops.convolve if op == "Conv" else integer_ops.convolve_transposed
    np.testing.assert_array_equal(function(node, x, w), expected)


def test_accumulators_are_checked() -> None:
    with pytest.raises(integer_ops.Overflow, match="conv7"):
        integer_ops.to_int32(np.array([2.0**31]), "conv7")
