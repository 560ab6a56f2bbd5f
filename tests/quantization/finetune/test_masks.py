"""Networks that are pruned while they are trained."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe.errors import UserError
from edgepipe.quantization.finetune import FinetuneSettings
from quantization.finetune.tasks import SMALL, content, learnable, outputs, tune
from quantization.networks import build

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.needs_torch

PATTERNS = {"50%": 0.5, "2:4": 0.5, "1:4v2": 0.25, "50%b1x4": 0.5}


def weights(model: ir.Model) -> dict[str, np.ndarray]:
    """Of the convolutions, by output channels, as codes where they are codes."""
    found = {}
    for node in model.graph:
        if node.op_type == "Conv":
            value = node.inputs[1]
            while value.producer() is not None:  # through DequantizeLinear
                value = value.producer().inputs[0]
            found[node.name] = value.const_value.numpy()
    return found


def share_of_groups(weight: np.ndarray, pattern: str) -> bool:
    """Whether ``weight`` [outputs, inputs, …] has the pattern and no more zeros than that."""
    live = weight != 0
    if pattern == "50%":
        return int(live.sum()) == round(0.5 * live.size)
    if pattern == "50%b1x4":
        blocks = np.add.reduceat(live, [0, 4], axis=1) > 0
        return int(blocks.sum()) == round(0.5 * blocks.size)
    kept, shared = (2, 1) if pattern == "2:4" else (1, 2)
    alike = live.reshape(len(live) // shared, shared, *live.shape[1:])
    full, rest = live[:, :4].sum(1), live[:, 4:].sum(1)  # of six inputs
    same = bool((alike == alike[:, :1]).all())
    return same and bool((full == kept).all()) and bool((rest == -(-2 * kept // 4)).all())


@pytest.mark.slow
@pytest.mark.parametrize("pruning", ["gradual", "decay", "straight"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_pattern_is_there_in_the_end(pattern: str, pruning: str) -> None:
    model = build(SMALL)
    x, labels = learnable(model)
    tuned, _ = tune(model, None, (x, labels), epochs=8, sparsity=pattern, pruning=pruning)
    first, second = weights(tuned).values()
    assert np.count_nonzero(first) == first.size  # it reads the input
    assert share_of_groups(second, pattern)
    assert not share_of_groups(weights(model)[list(weights(model))[1]], pattern)
    right = np.mean(outputs(tuned, x)[0].argmax(1) == labels)
    assert right > np.mean(outputs(model, x)[0].argmax(1) == labels) + 0.2


def test_every_layer_has_the_pattern_that_it_was_given() -> None:
    model = build(SMALL)
    first, second = weights(model)
    tuned, _ = tune(model, None, learnable(model), epochs=2, sparsity={second: "2:4"})
    assert share_of_groups(weights(tuned)[second], "2:4")
    assert not share_of_groups(weights(model)[second], "2:4")
    with pytest.raises(UserError, match=f"'{first}' is no layer that can be pruned.*{second}"):
        tune(model, None, learnable(model), sparsity={first: "2:4"})
    with pytest.raises(UserError, match="no layer of the network can be pruned"):
        tune(model, None, learnable(model), sparsity={second: "dense"})


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a8"])
def test_codes_are_zero_where_weights_are(recipe: str) -> None:
    model = build(SMALL)
    data = learnable(model)
    sparse, _ = tune(model, None, data, sparsity="2:4")
    tuned, _ = tune(sparse, recipe, data, sparsity="kept")
    before, codes = list(weights(sparse).values())[1], list(weights(tuned).values())[1]
    assert codes.dtype.name == f"int{recipe[1]}" and not codes[before == 0].any()
    assert np.count_nonzero(codes) > 0.5 * np.count_nonzero(before)
    joint, _ = tune(model, recipe, data, sparsity="2:4")
    found = list(weights(joint).values())[1]
    assert (np.add.reduceat(found != 0, [0, 4], axis=1) <= [[[[2]], [[1]]]]).all()


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_bits(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepipe.quantization.finetune import training

    model = build(SMALL)
    data = learnable(model)
    wanted, _ = tune(model, "w8a8", data, sparsity="50%")
    step = training._step

    def cut(*arguments: object) -> float:
        if arguments[4] == 17:
            raise KeyboardInterrupt
        return step(*arguments)

    chosen = {"sparsity": "50%", "checkpoint": tmp_path, "checkpoint_seconds": 0.0}
    monkeypatch.setattr(training, "_step", cut)
    with pytest.raises(KeyboardInterrupt):
        tune(model, "w8a8", data, **chosen)
    monkeypatch.undo()
    resumed, lines = tune(model, "w8a8", data, **chosen)
    assert any("goes on at step 17" in line for line in lines)
    assert content(resumed) == content(wanted)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="unknown sparsity"):
        FinetuneSettings(sparsity="half")
    with pytest.raises(UserError, match=r"layer 'conv1'.*unknown sparsity"):
        FinetuneSettings(sparsity={"conv1": "kept"})
    for pattern in ("c40%", "auto"):
        with pytest.raises(UserError, match="prune first"):
            FinetuneSettings(sparsity=pattern)
    with pytest.raises(UserError, match=r"unknown pruning 'straigt'.*straight"):
        FinetuneSettings(sparsity="2:4", pruning="straigt")
