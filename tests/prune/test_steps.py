"""Pruning and training in turn: the way there, what comes out, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import passes, prune
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.importer import load
from edgepipe.importer.source import Source
from edgepipe.prune import steps
from edgepipe.quantization.finetune import FinetuneSettings
from edgepipe.quantization.layers import Layer, prunable
from edgepipe.recipe import Recipe
from edgepipe.sparsity.pattern import Pattern
from edgepipe.target import Target
from tests.prune.test_amounts import plain
from tests.prune.test_channels import Network

#: Towards the network's own outputs, which need no labels.
SETTINGS = FinetuneSettings(
    epochs=20, batch=8, loss="squared_error", distillation=1.0, learning_rate=0.02
)


@pytest.mark.parametrize(
    ("pattern", "way"),
    [
        ("80%", ["47.47%", "64.87%", "74.54%", "80%"]),
        ("80%b1x4", ["47.47%b1x4", "64.87%b1x4", "74.54%b1x4", "80%b1x4"]),
        ("2:4v8", ["3:4v8", "2:4v8"]),
        ("1:4", ["2:4", "1:4"]),
        ("1:8", ["3:8", "2:8", "1:8"]),
        ("3:4", ["3:4"]),
        ("c40%", ["c40%"]),
        ("auto50%", ["auto50%"]),
    ],
)
def test_the_way_ends_at_the_pattern_after_all_epochs(pattern: str, way: list[str]) -> None:
    for epochs in (100, 40, 7, 1, 0):
        found = steps.plan(Pattern.parse(pattern, ""), epochs)
        assert [str(step.pattern) for step in found] == way
        assert sum(step.epochs for step in found) == epochs
        assert all(step.epochs >= 0 for step in found)
        assert found[-1].epochs >= sum(step.epochs for step in found[:-1])
        assert len(found) > 1 or found[0].rate == 1.0
        assert found[-1].rate == 1 and (len(way) == 1 or found[0].rate < 1)


def test_every_step_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for what prunes and trains, which name what they were given."""
    graph, source, x, context = made(tmp_path / "net.onnx", "fp32+80%")
    pruned, trained = [], []

    def prune_run(model: Any, _: Any, samples: Any, own: Context) -> tuple[str, str]:
        assert own.recipe.settings.distill is None
        pruned.append((model, str(own.recipe), samples["x"].shape))
        return f"pruned {len(pruned)}", f"facts {len(pruned)}"

    def finetune(*arguments: Any) -> str:
        trained.append(arguments)
        return f"trained {len(trained)}"

    monkeypatch.setattr(prune, "run", prune_run)
    monkeypatch.setattr(steps, "finetune", finetune)
    context = replace(context, recipe=Recipe.read("fp32+80%", {"distill": 9}))
    data = np.tile(x, (12, 1, 1, 1)), None
    result = steps.run(graph, source, data, replace(SETTINGS, epochs=100), context)
    assert result == ("trained 4", "facts 4")
    first = [graph, "trained 1", "trained 2", "trained 3"]
    recipes = ["fp32+47.47%", "fp32+64.87%", "fp32+74.54%", "fp32+80%"]
    assert pruned == [(m, r, (512, 3, 8, 8)) for m, r in zip(first, recipes, strict=True)]
    assert [a[0] for a in trained] == [f"pruned {i}" for i in (1, 2, 3, 4)]
    assert [a[3].epochs for a in trained] == [10, 10, 12, 68]
    assert [a[3].learning_rate for a in trained] == [0.01, 0.01, 0.015, 0.02]
    for _, config, given, settings, own, teacher in trained:
        assert config is None and given[0]["x"] is data[0] and given[1] is None
        assert teacher is graph
        assert settings.sparsity == "kept" and own.recipe.sparsity is not None
    # With labels they come last, with the teacher; before, the dense network's outputs alone.
    pruned.clear(), trained.clear()
    labels = np.zeros((len(data[0]), *data[0].shape[1:]), np.float32)
    settings = replace(SETTINGS, epochs=100, loss="cross_entropy", distillation=0.5)
    result = steps.run(graph, source, (data[0], labels), settings, context, "teacher")  # type: ignore[arg-type]
    assert result == ("trained 5", "facts 4")
    assert [a[3].epochs for a in trained] == [8, 8, 9, 50, 25]
    for _, _, (inputs, given), changed, _, teacher in trained[:-1]:
        assert inputs["x"] is data[0] and given is None and teacher is graph
        assert (changed.loss, changed.distillation) == ("squared_error", 1.0)
    model, _, (_, given), changed, own, teacher = trained[-1]
    assert (model, teacher) == ("trained 4", "teacher") and given is labels and own is context
    assert changed == replace(settings, epochs=25, sparsity="kept")


def made(path: Path, recipe: str) -> tuple[ir.Model, Source, np.ndarray, Context]:
    ir.save(plain(Network()), path)
    source = load(path)
    context = Context(Target.load("x86-64-v3"), Recipe.parse(recipe))
    x = np.random.default_rng(1).standard_normal((48, 3, 8, 8), dtype=np.float32)
    return passes.run(source.model, context), source, x, context


def zeros(model: ir.Model) -> list[np.ndarray]:
    """Where the layers that can be pruned have them."""
    return [Layer.of(node).weight == 0 for node in prunable(model.graph, None)]


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize("pattern", ["60%", "1:4"])
def test_steps_end_nearer_than_one_go(pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from quantization.finetune.tasks import outputs

    graph, source, x, context = made(tmp_path / "net.onnx", f"fp32+{pattern}")
    folder = tmp_path / "state"
    found, facts = steps.run(
        graph, source, (x, None), replace(SETTINGS, checkpoint=folder), context
    )
    density = Pattern.parse(pattern, "").density
    assert all(abs(z.mean() - (1 - density)) < 0.02 for z in zeros(found))
    assert set(facts.manifest["zeros"]) == {node.name for node in prunable(graph.graph, None)}
    once, _ = prune.run(graph, source, {"x": x}, context)
    right = outputs(graph, x)[0]
    far, near = (float(np.square(outputs(m, x)[0] - right).sum()) for m in (once, found))
    assert near < 0.9 * far
    count = len(steps.plan(Pattern.parse(pattern, ""), 1))
    assert sorted(p.name for p in folder.iterdir()) == [f"step-{i + 1}" for i in range(count)]
    again, _ = steps.run(graph, source, ({"x": x}, None), replace(SETTINGS, checkpoint=folder),
                         context)  # fmt: skip
    assert np.array_equal(outputs(again, x)[0], outputs(found, x)[0])


@pytest.mark.parametrize(
    ("recipe", "changes", "told"),
    [
        ("fp32", {}, "recipe 'fp32' has no zeros"),
        ("w8a8+80%b1x4", {}, "has no zeros in float"),
        ("fp32+80%", {"sparsity": "2:4"}, "sparsity is '2:4' there, and '80%' in the recipe"),
    ],
)
def test_what_has_no_steps_is_refused(
    recipe: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    graph, source, x, context = made(tmp_path / "net.onnx", recipe)
    with pytest.raises(UserError, match=told):
        steps.run(graph, source, (x, None), replace(SETTINGS, **changes), context)
