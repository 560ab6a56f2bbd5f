"""The solvers of one layer, against rounding and against each other, and each in a network."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.quantization import QuantConfig, adaquant, adaround, gptq, scales, weights
from edgepipe.quantization.scales import CodeRange
from quantization.networks import MIXED, build, quantize, run, samples, snr_db
from quantization.test_numbers import loss, problem

FOUR, EIGHT = CodeRange.of(4), CodeRange.of(8, 63)
#: Share of rounding's squared error that may remain, measured with a tenth to spare.
REMAINS = {"gptq": 0.7, "reconstruction": 0.6, "adaround": 0.65, "adaquant": 0.65}


@pytest.mark.slow
@pytest.mark.parametrize("span", [FOUR, EIGHT])
@pytest.mark.parametrize("method", REMAINS)
def test_solvers_beat_rounding(method: str, span: CodeRange) -> None:
    weight, gram, _ = problem(0, 48, 8)
    scale = scales.least_error(weight, span)
    rounded = loss(weight, scales.quantize(weight, scale, span) * scale, gram)
    solver = weights.solver_of(method)
    assert solver is not None
    codes, scale, bias = solver(weight, gram, span)
    assert codes.min() >= span.low and codes.max() <= span.high
    np.testing.assert_array_equal(codes, np.rint(codes))
    assert loss(weight, codes * scale, gram) < REMAINS[method] * rounded
    mean = np.einsum("gok,gk->go", codes * scale, gram.mean_x) + bias
    np.testing.assert_allclose(mean, gram.mean_y, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("span", [FOUR, EIGHT])
@pytest.mark.parametrize("method", REMAINS)
def test_weights_that_were_pruned_stay_zero(method: str, span: CodeRange) -> None:
    """And the others are fitted; without the mask zeros come back."""
    weight, gram, _ = problem(3, 48, 8)
    kept = np.random.default_rng(3).random(weight.shape) < 0.4
    weight = weight * kept
    solver = weights.solver_of(method)
    assert solver is not None
    codes, fitted, _ = solver(weight, gram, span, kept)
    assert (codes[~kept] == 0).all()
    scale = scales.least_error(weight, span)
    rounded = scales.quantize(weight, scale, span) * scale
    assert loss(weight, codes * fitted, gram) < loss(weight, rounded, gram)
    assert (solver(weight, gram, span, None)[0][~kept] != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("method", REMAINS)
def test_the_comparison_can_fail(method: str) -> None:
    """Positive control: the codes of two output channels swapped."""
    weight, gram, _ = problem(0, 24, 6)
    scale = scales.least_error(weight, FOUR)
    rounded = loss(weight, scales.quantize(weight, scale, FOUR) * scale, gram)
    solver = weights.solver_of(method)
    assert solver is not None
    codes, scale, _ = solver(weight, gram, FOUR)
    assert loss(weight, (codes * scale)[:, [1, 0, 2, 3, 4, 5]], gram) > rounded


def test_the_walk_keeps_columns_in_place() -> None:
    weight, gram, _ = problem(3)
    hessian = gptq.unit(gptq.regularised(gram))
    walk = gptq.Walk.of(hessian)
    variance = np.diagonal(hessian[0])[walk.order[0, 0]]
    assert (np.diff(variance) <= 0).all() and sorted(walk.order[0, 0]) == list(range(24))
    fine = np.full((1, 6, 1), 1e-3, np.float32)
    wide = CodeRange(32, -(10**6), 10**6)
    found = walk.round(weight, fine, wide) * fine
    np.testing.assert_allclose(found, weight, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "gptq",
        pytest.param("adaround", marks=pytest.mark.slow),
        pytest.param("adaquant", marks=pytest.mark.slow),
    ],
)
def test_networks_at_four_bits(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for learner in (adaround, adaquant):
        monkeypatch.setattr(learner, "STEPS", 60)
    model = build(MIXED)
    fresh = samples(model, 16, seed=4)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    found = [
        np.concatenate([run(quantize(model, "w4a8", methods=m)[0], s)[0] for s in fresh])
        for m in ((), (method,))
    ]
    assert snr_db(expected, found[1]) > snr_db(expected, found[0])


def test_biases_of_matmul_reach_the_layers_behind() -> None:
    """What is fitted to the quantized network must see the biases that it will have."""
    text = """n (float[8, 32] x) => (float[8, 8] y)
    <float[32,32] w0, float[32,32] w1, float[32,32] w2, float[32,8] w3> {
        a = MatMul(x, w0)
        b = Gelu(a)
        c = MatMul(b, w1)
        d = Gelu(c)
        e = MatMul(d, w2)
        f = Gelu(e)
        y = MatMul(f, w3) }"""
    model = build(text)
    fresh = samples(model, 16, seed=4)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    result, _ = quantize(model, "w4a8", methods=("bias_correction",))
    found = np.concatenate([run(result, s)[0] for s in fresh])
    assert np.abs((found - expected).mean(0)).max() < 0.15 * np.abs(expected).mean()


def test_methods_that_need_torch_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"edgepipe\[torch\]"):
        weights.solver_of("adaround")


@pytest.mark.slow
def test_weight_only_fits() -> None:
    model = build(MIXED)
    fresh = samples(model, 16, seed=4)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    found = {
        method: snr_db(
            expected,
            np.concatenate(
                [
                    run(quantize(model, "w4g2", methods=(method,), depthwise="same")[0], s)[0]
                    for s in fresh
                ]
            ),
        )
        for method in ("bias_correction", "gptq", "reconstruction")
    }
    assert min(found["gptq"], found["reconstruction"]) > found["bias_correction"]
    with pytest.raises(UserError, match="float activations"):
        QuantConfig.parse("w8a16", methods=("adaround",))
