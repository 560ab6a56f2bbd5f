"""Equalisation, bias and variance match, weight-only groups; and accuracy of a real network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import importer, passes, quantization
from edgepipe.quantization import QuantConfig, equalization
from edgepipe.quantization.weight_only import block_size
from quantization.networks import MIXED, build, context, quantize, run, samples, snr_db

CHAIN = """
n (float[1,3,8,8] x) => (float[1,4,8,8] y)
<float[16,3,3,3] w0, float[16] b0, float[4,16,1,1] w1, float[4] b1{extra}> {{
    c = Conv<pads=[1,1,1,1]>(x, w0, b0)
    r = {activation}
    y = Conv(r, w1, b1) }}"""
RELU = CHAIN.format(extra="", activation="Relu(c)")
RELU6 = CHAIN.format(extra=", float lo = {0.0}, float hi = {6.0}", activation="Clip(c, lo, hi)")


def uneven() -> dict[str, np.ndarray]:
    """Weights whose channels differ a hundredfold, undone by the next layer."""
    generator = np.random.default_rng(0)
    size = np.geomspace(0.1, 10, 16).astype(np.float32)
    w0 = generator.standard_normal((16, 3, 3, 3)).astype(np.float32) * size[:, None, None, None]
    w1 = generator.standard_normal((4, 16, 1, 1)).astype(np.float32) / size[None, :, None, None]
    return {"w0": w0, "w1": w1}


def test_equalisation_keeps_the_function() -> None:
    for text in (RELU, MIXED):
        model = build(text)
        changed = model.clone()
        batch = samples(model, 8)
        inputs = {changed.graph.inputs[0]: np.stack([s["x"] for s in batch])}
        equalization.equalize(
            changed.graph, inputs, (8, 8), lambda subject, text, doubt=False: None
        )
        assert snr_db(run(model, batch[0])[0], run(changed, batch[0])[0]) > 110
        assert any("equalised" in name for name in changed.graph.initializers)


@pytest.mark.parametrize(
    "between",
    [
        "t = Concat<axis=1>(r, held)",  # a part is constant
        "t = Slice(r, first, last, back, step)",  # the channels, counted from the back
    ],
)
def test_equalisation_keeps_the_function_of(between: str) -> None:
    channels = 8 if "Slice" in between else 16
    text = f"""n (float[1, 3, 6, 6] x) => (float[1, 4, 6, 6] y)
    <float[12,3,1,1] w0, float[4,{channels},1,1] w1, float[1,4,6,6] held,
     int64[1] first = {{10}}, int64[1] last = {{2}},
     int64[1] back = {{-3}}, int64[1] step = {{-1}}> {{
        a = Conv(x, w0)
        r = Relu(a)
        {between}
        y = Conv(t, w1) }}"""
    if "held" not in between:
        text = text.replace(" float[1,4,6,6] held,", "")
    model = build(text)
    changed = model.clone()
    batch = samples(model, 8)
    inputs = {changed.graph.inputs[0]: np.stack([s["x"] for s in batch])}
    equalization.equalize(changed.graph, inputs, (8, 8), lambda subject, text, doubt=False: None)
    assert snr_db(run(model, batch[0])[0], run(changed, batch[0])[0]) > 110


def test_equalisation_helps_uneven_channels() -> None:
    model = build(RELU, **uneven())
    plain, _ = quantize(model, methods=())
    equal, _ = quantize(model, methods=("equalization",))
    fresh = samples(model, 8, seed=3)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    results = [np.concatenate([run(m, s)[0] for s in fresh]) for m in (plain, equal)]
    assert snr_db(expected, results[1]) > snr_db(expected, results[0]) + 3


@pytest.mark.parametrize(
    ("recipe", "equal"), [("w4a4", True), ("w8a8", True), ("w4a8", False), ("w8a16", False)]
)
def test_equalisation_is_a_default_where_weights_can_spare_it(recipe: str, equal: bool) -> None:
    result, _ = quantize(build(RELU, **uneven()), recipe)
    assert any("equalised" in name for name in result.graph.initializers) is equal


def test_equalisation_leaves_clip_alone() -> None:
    model = build(RELU6, **uneven())
    ranges = equalization.channel_ranges(
        model.graph, {model.graph.inputs[0]: np.stack([s["x"] for s in samples(model, 4)])}
    )
    assert not equalization.plan(
        model.graph, ranges, lambda subject, text, doubt=False: None
    ).factors


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bias_correction", "mean_variance", "reconstruction"])
def test_methods_beat_rounding_at_four_bits(method: str) -> None:
    model = build(MIXED)
    fresh = samples(model, 24, seed=4)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    plain, _ = quantize(model, "w4a8", methods=())
    better, _ = quantize(model, "w4a8", methods=(method,))
    results = [np.concatenate([run(m, s)[0] for s in fresh]) for m in (plain, better)]
    assert snr_db(expected, results[1]) > snr_db(expected, results[0])


def test_groups_divide_the_channels() -> None:
    assert block_size(64, 32) == 32
    assert block_size(24, 32) == 24
    assert block_size(48, 32) == 24
    assert block_size(37, 32) is None and block_size(1, 32) is None
    assert block_size(64, None) is None


def test_groups_are_blocks_of_input_channels() -> None:
    text = """n (float[2, 64] x) => (float[2, 8] y) <float[8,64] w, float[8] b> {
        y = Gemm<transB=1>(x, w, b) }"""
    model = build(text)
    result, _ = quantize(model, "w4g16", first_last="same")
    (node,) = [n for n in result.graph if n.op_type == "DequantizeLinear"]
    assert node.attributes.get_int("block_size") == 16
    assert node.inputs[0].dtype == ir.DataType.INT4 and tuple(node.inputs[1].shape) == (8, 4)
    sample = samples(model, 1, seed=2)[0]
    assert snr_db(run(model, sample)[0], run(result, sample)[0]) > 18


def test_memory_bounds_the_samples_but_not_the_result() -> None:
    """With 1 MiB the fronts hold a few samples at a time; others catch up later."""
    model = build(MIXED)
    result, _ = quantize(model, "w4a8", memory_bytes=1 << 20)
    fresh = samples(model, 8, seed=6)
    expected = np.concatenate([run(model, s)[0] for s in fresh])
    assert snr_db(expected, np.concatenate([run(result, s)[0] for s in fresh])) > 15


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize(
    ("recipe", "agreement"), [("w8a8", 0.96), ("w4a8", 0.91)], ids=["w8a8", "w4a8"]
)
def test_trained_network(shared_models: Path, recipe: str, agreement: float) -> None:
    """Top-1 agreement with float on 400 images that calibration never saw."""
    graph = passes.run(importer.load(shared_models / "ic_resnet8.onnx", None).model, context())
    arrays = []
    for name, count in (("cifar10_train5000", 256), ("cifar10_val2000", 400)):
        with np.load(shared_models.parent / "data" / f"{name}.npz") as data:
            arrays.append(np.float32(data["images"][:count].transpose(0, 3, 1, 2)))
    calibration = [{"x": x[None]} for x in arrays[0]]
    result = quantization.apply(graph, QuantConfig.parse(recipe), calibration, context())
    same = [
        run(graph, {"x": x[None]})[0].argmax() == run(result, {"x": x[None]})[0].argmax()
        for x in arrays[1]
    ]
    assert np.mean(same) >= agreement


def test_a_network_of_one_layer() -> None:
    """Nothing but its input is quantized, so nothing has to be observed."""
    model = build(
        "n (float[1,3,8,8] x) => (float[1,4,8,8] y)\n<float[4,3,1,1] w> { y = Conv(x, w) }"
    )
    quantized, _ = quantize(model)
    sample = samples(model, 1, seed=7)[0]
    assert snr_db(run(model, sample)[0], run(quantized, sample)[0]) > 30


def test_moments_of_models_with_a_batch() -> None:
    """Positions are drawn of every image, of which a sample has three: all in each of them."""
    text = "net (float[3,3,16,12] x) => (float[3,4,16,12] y) <float[4,3,1,1] w> { y = Conv(x, w) }"
    model = build(text)
    feeds = samples(model, 1, seed=9)[0]
    found = quantization.apply(model, QuantConfig(), samples(model, 100), context())
    assert snr_db(run(model, feeds)[0], run(found, feeds)[0]) > 20


def test_equalization_of_grouped_transposed_convolutions() -> None:
    text = """net (float[1,4,5,5] x) => (float[1,3,7,7] y)
    <float[4,3,3,3] w, float[6] b, float[3,6,1,1] v> {
        t = ConvTranspose <group=2> (x, w, b)
        r = Relu(t)
        y = Conv(r, v)
    }"""
    model = build(text)
    found, _ = quantize(model, methods=("equalization",))
    feeds = samples(model, 1, seed=9)[0]
    assert snr_db(run(model, feeds)[0], run(found, feeds)[0]) > 25
