"""Training what is pruned towards the dense network, as a recipe asks for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import prune
from edgepipe.context import Context
from edgepipe.data import Samples
from edgepipe.errors import UserError
from edgepipe.prune import distillation
from edgepipe.quantization.finetune import FinetuneSettings
from edgepipe.quantization.layers import Layer, prunable
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.prune.test_amounts import made

#: Lines of progress.
LINES: list[str] = []


def run(
    path: Path, recipe: str, count: int = 48, **settings: Any
) -> tuple[ir.Model, ir.Model, np.ndarray, dict[str, Any]]:
    """The dense network, the one that is left of it, inputs that neither saw, and the manifest."""
    graph, source, x, _ = made(path, recipe)
    context = Context(
        Target.load("x86-64-v3"), Recipe.read(recipe, settings), progress=LINES.append
    )
    samples = Samples("x", count, lambda: ({"x": a[None]} for a in x[:count]))
    model, pruned = prune.run(graph, source, samples, context)
    assert pruned is not None
    fresh = np.random.default_rng(7).standard_normal((32, 3, 8, 8), dtype=np.float32)
    return graph, model, fresh, pruned.manifest


@pytest.mark.needs_torch
@pytest.mark.parametrize("recipe", ["fp32+1:4", "fp32+60%", "fp32+c40%"])
def test_it_comes_nearer_on_inputs_that_it_did_not_see(recipe: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from quantization.finetune.tasks import outputs

    graph, once, fresh, plain = run(tmp_path / "net.onnx", recipe)
    _, found, _, facts = run(tmp_path / "net.onnx", recipe, distill=40)
    right = outputs(graph, fresh)[0]
    far, near = (float(np.square(outputs(m, fresh)[0] - right).sum()) for m in (once, found))
    assert near < 0.9 * far
    assert facts == {**plain, "distilled": 40}
    assert LINES[-1] == "fine-tuning epoch 40 of 40"
    pairs = [[Layer.of(n).weight for n in prunable(m.graph, None)] for m in (once, found)]
    for before, after in zip(*pairs, strict=True):
        assert np.array_equal(before == 0, after == 0) and not np.array_equal(before, after)


def test_what_trains_and_towards_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def finetune(*arguments: Any) -> ir.Model:
        given.append(arguments)
        return arguments[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(distillation, "finetune", finetune)
    graph, _, _, _ = run(tmp_path / "net.onnx", "fp32+2:4", distill=5)
    _, config, (inputs, labels), settings, context, teacher = given.pop()
    assert config is None and labels is None and inputs["x"].shape == (48, 3, 8, 8)
    assert context.recipe.settings.distill == 5 and teacher.graph.name == graph.graph.name
    assert not any((Layer.of(n).weight == 0).any() for n in prunable(teacher.graph, None))
    wanted = FinetuneSettings(
        epochs=5, batch=32, learning_rate=8e-3, loss="squared_error", distillation=1.0,
        augmentation="shift_flip", sparsity="kept", normalization="batch",
    )  # fmt: skip
    assert settings == wanted
    run(tmp_path / "net.onnx", "fp32+c40%", count=5, distill=5)
    settings = given.pop()[3]
    assert (settings.sparsity, settings.normalization) == ("", "none")
    assert settings.learning_rate < wanted.learning_rate
    run(tmp_path / "net.onnx", "fp32+2:4")
    assert not given


def test_it_needs_data_and_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, source, _, _ = made(tmp_path / "net.onnx", "fp32+2:4")
    context = Context(Target.load("x86-64-v3"), Recipe.read("fp32+2:4", {"distill": 5}))
    with pytest.raises(UserError, match="no data to train on"):
        prune.run(graph, source, None, context)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="torch is not installed"):
        run(tmp_path / "net.onnx", "fp32+2:4", distill=5)


@pytest.mark.parametrize(
    ("recipe", "value", "told"),
    [
        ("fp32", 5, "fp32 prunes nothing"),
        ("w8a8", 5, "w8a8 prunes nothing"),
        ("fp32+2:4", 0, "distill 0 is outside 1…10000"),
        ("fp32+2:4", 10_001, "distill 10001 is outside"),
        ("fp32+2:4", "5", "'distill' must be a whole number"),
        ("fp32+2:4", True, "'distill' must be a whole number"),
    ],
)
def test_recipes_that_cannot_be(recipe: str, value: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Recipe.read(recipe, {"distill": value})
    assert Recipe.read("fp32+c40%", {"distill": 7}).settings.to_json() == {"distill": 7}
