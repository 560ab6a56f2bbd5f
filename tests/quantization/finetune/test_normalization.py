"""Normalization while a network is trained, which the result no longer has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edgepipe.errors import UserError
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.finetune import FinetuneSettings, run
from quantization.finetune.tasks import SMALL, learnable, losses, outputs, tune
from quantization.networks import MIXED, build, context

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.needs_torch

#: Convolutions without a bias, grouped, and one that nothing normalizes behind it.
BARE = """
network (float[1, 4, 6, 6] x) => (float[1, 3] y)
<float[6,4,1,1] w0, float[6,2,3,3] w1, float[3,6] w2, int64[2] flat = {1, 6}> {
    c0 = Conv(x, w0)
    r0 = Relu(c0)
    c1 = Conv<group=3>(r0, w1)
    g = GlobalAveragePool(c1)
    f = Reshape(g, flat)
    y = Gemm<transB=1>(f, w2)
}
"""


@pytest.mark.parametrize("text", [SMALL, MIXED, BARE])
def test_what_is_folded_computes_what_was_trained(text: str) -> None:
    """After a step in training mode and with scales and shifts that are no longer the first."""
    from edgepipe.quantization.finetune import normalization
    from edgepipe.quantization.finetune.examples import Examples
    from edgepipe.quantization.finetune.network import Network

    model, generator = build(text), torch.Generator().manual_seed(4)
    shape = (32, *tuple(model.graph.inputs[0].shape)[1:])
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    settings = FinetuneSettings(batch=16)
    network = Network(model.graph, None)
    examples = Examples.of(model.graph, x, np.zeros(len(x), int), settings)
    given = {"x": torch.tensor(x)}
    with torch.no_grad():
        before = network(given)[0].numpy()
        normalization.add(network, examples, settings)
        begun = network.eval()(given)[0].numpy()
        np.testing.assert_allclose(begun, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())
        normed = [layer for layer in network.layers if layer.norm is not None]
        assert len(normed) == sum(node.op_type == "Conv" for node in model.graph)
        # Two batches are all samples there are.
        traced = dict.fromkeys(network.graph.inputs, given["x"])
        Network(model.graph, None).trace(traced)
        for layer in normed:
            seen = traced[layer.layer.node.outputs[0]].transpose(0, 1).flatten(1)
            torch.testing.assert_close(layer.norm.mean, seen.mean(1))
            torch.testing.assert_close(layer.norm.variance, seen.var(1, unbiased=False))
        for layer in normed:
            for parameter in layer.norm.parameters():
                parameter.mul_(1 + torch.rand(parameter.shape, generator=generator))
        network.train()(given)  # moves the running averages
        trained = network.eval()(given)[0].numpy()
        assert np.abs(trained - before).max() > 0.1 * np.abs(before).max()
        for layer in network.layers:
            normalization.fold(layer)
        folded = network(given)[0].numpy()
    np.testing.assert_allclose(folded, trained, rtol=1e-4, atol=1e-4 * np.abs(trained).max())


@pytest.mark.parametrize("sparsity", ["", "50%"])
def test_the_graph_computes_what_the_trained_network_does(sparsity: str) -> None:
    from edgepipe.quantization.finetune import result
    from edgepipe.quantization.finetune.examples import Examples
    from edgepipe.quantization.finetune.training import train

    model = build(SMALL)
    x, labels = learnable(model)
    settings = FinetuneSettings(
        epochs=2, batch=16, learning_rate=0.02, normalization="batch", sparsity=sparsity
    )
    examples = Examples.of(model.graph, x, labels, settings)
    trained, network = result.begin(model, None, examples, settings, context())
    train(network, None, examples, settings, None, lambda _: None)
    with torch.no_grad():
        wanted = network({"x": torch.tensor(x)})[0].numpy()
    result.write(trained, network)
    found = outputs(trained, x)[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert np.abs(wanted - outputs(model, x)[0]).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("sparsity", ["", "50%", "kept"])
def test_it_learns_and_zeros_stay(sparsity: str) -> None:
    model = build(SMALL)
    if sparsity == "kept":
        value = model.graph.initializers["w1"]
        half = value.const_value.numpy().copy()
        half[:, ::2] = 0
        model = build(SMALL, w1=half)
    x, labels = learnable(model)
    tuned, lines = tune(model, None, (x, labels), epochs=12, sparsity=sparsity,
                        normalization="batch", augmentation="flip", distillation=0.3)  # fmt: skip
    right = np.mean(outputs(tuned, x)[0].argmax(1) == labels)
    assert right > np.mean(outputs(model, x)[0].argmax(1) == labels) + 0.2
    assert losses(lines)[-1] < losses(lines)[0]
    assert [node.op_type for node in tuned.graph] == [node.op_type for node in model.graph]
    second = [node for node in tuned.graph if node.op_type == "Conv"][1].inputs[1]
    zeros = np.mean(second.const_value.numpy() == 0)
    assert zeros == (0.5 if sparsity else 0.0)


def test_without_epochs_it_is_the_network() -> None:
    model = build(SMALL)
    tuned, _ = tune(model, None, learnable(model), epochs=0, normalization="batch")
    for name, value in model.graph.initializers.items():
        found = tuned.graph.initializers[name].const_value.numpy()
        np.testing.assert_allclose(found, value.const_value.numpy(), rtol=1e-5, atol=1e-6)


def test_a_channel_without_variance_stays_what_it_is() -> None:
    model = build(SMALL)
    weight = model.graph.initializers["w0"].const_value.numpy().copy()
    weight[2] = 0
    model = build(SMALL, w0=weight)
    tuned, _ = tune(model, None, learnable(model), normalization="batch")
    found = [v.const_value.numpy() for v in tuned.graph.initializers.values()]
    assert all(np.isfinite(array).all() for array in found)


def test_refusals() -> None:
    model = build(SMALL)
    x, labels = learnable(model)
    settings = FinetuneSettings(epochs=1, normalization="batch")
    with pytest.raises(UserError, match="train in float first"):
        run(model, QuantConfig(), (x, labels), settings, context())
    with pytest.raises(UserError, match="batches of 4 are too small"):
        run(model, None, (x, labels), replace(settings, batch=4), context())
    with pytest.raises(UserError, match="batches of 7 are too small"):
        run(model, None, (x[:7], labels[:7]), settings, context())
    with pytest.raises(UserError, match="unknown normalization 'batsh'"):
        FinetuneSettings(normalization="batsh")
