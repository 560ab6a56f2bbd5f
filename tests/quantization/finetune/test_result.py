"""The Q/DQ graph computes what was trained, whatever the operators."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgepipe import importer, passes
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.finetune import FinetuneSettings, run
from edgepipe.quantization.interpreter import Interpreter
from quantization.finetune.tasks import SMALL, learnable, losses, outputs, tune
from quantization.networks import MIXED, build, context, samples, snr_db

torch = pytest.importorskip("torch")

from edgepipe.quantization.finetune import result  # noqa: E402
from edgepipe.quantization.finetune.examples import Examples  # noqa: E402
from edgepipe.quantization.finetune.training import train  # noqa: E402

pytestmark = pytest.mark.needs_torch

#: Share of codes that may differ by one between torch and ONNX Runtime: float sums in another
#: order fall on the other side of a tie.
MOST_DIFFERENT = 1e-3

OTHERS = """
network (float[1, 4, 6, 6] x) => (float[1, 6, 24] y)
<float[4,3,2,2] w0, float[6] b0, float[6,3,3,3] w1, float[6] b1, float[12,12] w2, float[12,24] w3,
 int64[3] rows = {1, 6, 144}, int64[3] more = {1, 72, 12}, int64[3] last = {1, 6, 24},
 int64[3] wide = {1, 36, 24}, float[1,1,24] scale, int64[1] a = {0}, int64[1] b = {6},
 int64[1] c = {1}> {
    c0 = ConvTranspose<strides=[2,2], group=2>(x, w0, b0)
    h = HardSwish(c0)
    c1 = Conv<pads=[1,1,1,1], group=2>(h, w1, b1)
    m = Mul(c1, h)
    f = Reshape(m, more)
    d = MatMul(f, w2)
    t = Tanh(d)
    e = MatMul(t, w3)
    u = Slice(e, a, b, c)
    y = Mul(u, scale)
}
"""


def traced(
    model: ir.Model, recipe: str, x: np.ndarray, **changes: object
) -> tuple[ir.Model, dict[str, np.ndarray], list[np.ndarray]]:
    """The Q/DQ graph after a training, and the codes and outputs that torch computes for ``x``."""
    settings = FinetuneSettings(
        epochs=2, batch=16, learning_rate=0.02, distillation=1.0, loss="squared_error"
    )
    config = QuantConfig.parse(recipe, **changes)
    examples = Examples.of(model.graph, x, None, settings)
    trained, network = result.begin(model, config, examples, settings, context())
    teacher = result.begin(model, None, examples, settings, context())[1].eval()
    train(network, teacher, examples, settings, None, lambda line: None)
    values = {network.graph.inputs[0]: torch.from_numpy(x)}
    with torch.no_grad():
        rounded = network.trace(values)
    codes = {v.name: network.grid(v).grid.codes(array.numpy()) for v, array in rounded.items()}
    computed = [values[v].numpy() for v in network.graph.outputs]
    result.write(trained, network)
    return trained, codes, computed


def onnx_codes(model: ir.Model, x: np.ndarray) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Codes by name of the tensor, and outputs, of ONNX Runtime sample by sample."""
    probe = model.clone()
    count = len(probe.graph.outputs)
    codes = [n.outputs[0] for n in probe.graph if n.op_type == "QuantizeLinear"]
    probe.graph.outputs.extend(codes)
    arrays = outputs(probe, x)
    named = {
        v.name.removesuffix("/codes"): array.astype(np.int32)
        for v, array in zip(codes, arrays[count:], strict=True)
    }
    return named, arrays[:count]


def differing(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[float, float]:
    """Share of codes that differ, and of samples in which the first tensor to differ does so by
    more than one: later layers may amplify the one code that their input is off by.

    Tensors are in the order of computation, samples on the first axis.
    """
    pairs = [
        np.abs(codes - theirs[name]).reshape(len(codes), -1).max(-1) for name, codes in ours.items()
    ]
    worst = np.stack(pairs)  # tensors × samples
    before = np.cumsum(worst, axis=0) - worst
    total = sum(codes.size for codes in ours.values())
    unequal = sum(np.count_nonzero(codes != theirs[name]) for name, codes in ours.items())
    return float(unequal / total), float(((worst > 1) & (before == 0)).any(0).mean())


@pytest.mark.slow
@pytest.mark.parametrize("text", [MIXED, OTHERS])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("w8a8", {"quantize_outputs": True}),
        ("w4a8", {"signed_activations": True, "symmetric_activations": True}),
        ("w4a4", {"fuse_residual": False}),
        ("w4a8", {"weight_limit": 63, "overrides": (("Mul", "float"), ("Concat", "float"))}),
    ],
)
def test_onnx_runtime_computes_what_torch_trained(
    text: str, recipe: str, changes: dict[str, object]
) -> None:
    model = build(text)
    x = np.concatenate([s["x"] for s in samples(model, 48)])
    trained, codes, computed = traced(model, recipe, x, **changes)
    onnx.checker.check_model(ir.serde.serialize_model(trained), full_check=True)
    found, expected = onnx_codes(trained, x)
    assert codes.keys() == found.keys(), "every quantized tensor is compared"
    different, far = differing(codes, found)
    assert different <= MOST_DIFFERENT and far == 0.0
    for ours, theirs in zip(computed, expected, strict=True):
        assert snr_db(theirs, ours) > 40


@pytest.mark.slow
def test_the_comparison_can_fail() -> None:
    """Positive control: two channels of a trained weight exchanged."""
    model = build(MIXED)
    x = np.concatenate([s["x"] for s in samples(model, 16)])
    trained, codes, _ = traced(model, "w8a8", x)
    names = (n for n in trained.graph.initializers if n.startswith("w1/") and n.endswith("/codes"))
    value = trained.graph.initializers[next(names)]
    array = value.const_value.numpy().copy()
    array[[0, 1]] = array[[1, 0]]
    value.const_value = ir.tensor(array, name=value.name)
    different, far = differing(codes, onnx_codes(trained, x)[0])
    assert different > 10 * MOST_DIFFERENT and far == 1.0


def test_integers_compute_it_too() -> None:
    model = build(MIXED)
    x = np.concatenate([s["x"] for s in samples(model, 16)])
    trained, codes, _ = traced(model, "w4a8", x)
    interpreter = Interpreter(trained)
    traces = [interpreter.trace({"x": x[i : i + 1]}) for i in range(len(x))]
    found = {
        v.name.removesuffix("/codes"): np.concatenate([t[v] for t in traces])
        for v in traces[0]
        if (v.name or "").endswith("/codes") and isinstance(traces[0][v], np.ndarray)
    }
    assert interpreter.floats == []
    different, far = differing(codes, found)
    assert different <= MOST_DIFFERENT and far == 0.0


@pytest.mark.slow
def test_training_changes_codes_steps_and_biases() -> None:
    model = build(SMALL)
    data = learnable(model)
    before, after = (tune(model, "w4a8", data, epochs=n)[0].graph.initializers for n in (0, 2))
    for name in ("w1/codes", "w1/scale", "w1/bias_codes", "r0/scale"):
        old, new = (graph[name].const_value.numpy() for graph in (before, after))
        assert old.shape == new.shape and not np.array_equal(old, new), name


@pytest.mark.slow
def test_averages_leave_the_steps_of_weights_alone() -> None:
    model = build(SMALL)
    data = learnable(model)
    before, after = (
        tune(model, "w4a8", data, epochs=n, ranges="average")[0].graph.initializers for n in (0, 2)
    )
    same = {n: np.array_equal(before[n].const_value, after[n].const_value) for n in before}
    assert same["w1/scale"] and not same["r0/scale"] and not same["w1/codes"]


def test_float_layers_in_a_quantized_network_are_trained() -> None:
    model = build(SMALL)
    x, labels = learnable(model)
    settings = FinetuneSettings(epochs=2, batch=16, learning_rate=0.02)
    config = QuantConfig(overrides=(("Gemm", "float"),))
    trained = run(model, config, (x, labels), settings, context())
    (gemm,) = [n for n in trained.graph if n.op_type == "Gemm"]
    old = model.graph.initializers["w2"].const_value.numpy()
    new = gemm.inputs[1].const_value.numpy()
    assert new.shape == old.shape and not np.array_equal(old, new)


def test_layers_that_shared_weights_get_their_own() -> None:
    model = build(
        """n (float[1, 5] x) => (float[1, 5] y) <float[5,5] w, float[5] b> {
        a = Gemm(x, w, b)
        r = Relu(a)
        y = Gemm(r, w, b) }"""
    )
    x = np.concatenate([s["x"] for s in samples(model, 64)])
    labels = np.abs(x).argmax(1)
    tuned, _ = tune(model, None, (x, labels))
    first, second = [n.inputs[1].const_value.numpy() for n in tuned.graph if n.op_type == "Gemm"]
    assert not np.array_equal(first, second)
    onnx.checker.check_model(ir.serde.serialize_model(tuned), full_check=True)


class Mask(torch.nn.Module):
    """Keeps what was smallest at zero."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", weight.abs() > weight.abs().median())

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.kept


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "w4a8"])
def test_a_mask_on_the_weights_is_trained_around(recipe: str | None) -> None:
    model = build(SMALL)
    x, labels = learnable(model)
    settings = FinetuneSettings(epochs=6, batch=16, learning_rate=0.02)
    config = None if recipe is None else QuantConfig.parse(recipe)
    examples = Examples.of(model.graph, x, labels, settings)
    trained, network = result.begin(model, config, examples, settings, context())
    layer = network.layers[1]
    mask = Mask(layer.weight.detach())
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", mask)
    lines: list[str] = []
    train(network, None, examples, settings, None, lines.append)
    assert losses(lines)[-1] < losses(lines)[0]
    result.write(trained, network)
    name = "w1" if recipe is None else "w1/codes"
    written = trained.graph.initializers[name].const_value.numpy()
    kept = mask.kept.numpy()
    assert not written[~kept].any() and (written[kept] != 0).mean() > 0.9


FACTORY = """
import torch
def small():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    net[1].running_mean.uniform_(-0.2, 0.2)
    net[1].running_var.uniform_(0.5, 2.0)
    return net, torch.zeros(1, 3, 8, 8)
"""


@pytest.mark.slow
def test_a_torch_module_takes_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finetune_factory.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    source = importer.load("finetune_factory:small")
    sys.modules.pop("finetune_factory", None)
    model = passes.run(source.model, context())
    assert "BatchNormalization" not in [n.op_type for n in model.graph]
    name = model.graph.inputs[0].name
    x, _ = learnable(build(SMALL))
    wanted = np.stack([x[:, i % 3].mean((1, 2)) for i in range(4)], 1)
    tuned, lines = tune(model, "w4a8", ({name: x}, wanted), loss="squared_error", epochs=15)
    assert losses(lines)[-1] < 0.5 * losses(lines)[0]
    (found,) = outputs(tuned, x)
    error = np.square(found - wanted).mean() / np.square(wanted).mean()
    assert error == pytest.approx(losses(lines)[-1], rel=0.2)
