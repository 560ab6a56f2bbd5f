"""From a network and a recipe to a trained one, in one call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import finetune, passes, prune
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.importer import load
from edgepipe.quantization.finetune import FinetuneSettings
from edgepipe.quantization.layers import Layer, prunable
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.prune.test_amounts import made

#: Towards the network's own outputs, which need no labels.
SETTINGS = FinetuneSettings(
    epochs=8, batch=16, learning_rate=8e-3, loss="squared_error", distillation=1.0,
    normalization="batch",
)  # fmt: skip


def outputs(model: ir.Model, x: np.ndarray) -> np.ndarray:
    from quantization.finetune import tasks

    return np.asarray(tasks.outputs(model, x)[0])


@pytest.fixture
def network(tmp_path: Path) -> tuple[str, np.ndarray]:
    """The path of a small one, and inputs."""
    path = tmp_path / "net.onnx"
    return str(path), made(path, "fp32+2:4")[2]


@pytest.mark.needs_torch
@pytest.mark.parametrize(
    "recipe", ["fp32+2:4", "fp32+c40%", "fp32+auto40%", "w8a8+50%b1x4", "w4a8"]
)
def test_what_comes_out_is_as_the_recipe_says(
    recipe: str, network: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    path, x = network
    lines: list[str] = []
    folder = tmp_path / "state"
    settings = replace(SETTINGS, checkpoint=folder)
    found = finetune.run(path, recipe, (x, None), settings, target="x86-64-v3",
                         progress=lines.append)  # fmt: skip
    parsed = Recipe.parse(recipe)
    graph = passes.run(load(path).model, Context(Target.load("x86-64-v3"), Recipe()))
    fresh = np.random.default_rng(5).standard_normal((32, *x.shape[1:]), dtype=np.float32)
    wanted, got = outputs(graph, fresh), outputs(found.model, fresh)
    assert np.square(got - wanted).mean() < 0.4 * np.square(wanted).mean()
    assert (found.pruned is None) == (parsed.sparsity is None)
    quantized = [n for n in found.model.graph if n.op_type == "DequantizeLinear"]
    assert bool(quantized) == parsed.quantizes
    assert {p.name for p in folder.iterdir()} == {
        *(["sparse"] if parsed.sparsity else []), *(["integers"] if parsed.quantizes else [])
    }  # fmt: skip
    if recipe == "fp32+2:4":
        for node in prunable(found.model.graph, None):
            weight = Layer.of(node).weight  # [outputs, inputs, taps down, taps across]
            fours = weight.reshape(len(weight), -1, 4, weight[0, 0].size)
            assert ((fours != 0).sum(2) == 2).all()
    if recipe == "w8a8+50%b1x4":
        values = [v.const_value for v in found.model.graph.initializers.values()]
        codes = [v.numpy() for v in values if v is not None and v.dtype == ir.DataType.INT8]
        assert max(float((c == 0).mean()) for c in codes if c.ndim == 4) > 0.45


def test_who_teaches_whom(network: tuple[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """With labels the dense network learns first, from them alone, and then teaches."""
    path, x = network
    given: list[Any] = []

    def train(model: Any, config: Any, data: Any, settings: Any, context: Any, *rest: Any) -> Any:
        given.append((config, data, settings, context.recipe, rest))
        return f"trained {len(given)}"

    def sparse_run(*arguments: Any) -> tuple[str, str]:
        given.append(arguments)
        return "sparse", "facts"

    monkeypatch.setattr(finetune, "train", train)
    monkeypatch.setattr(finetune, "sparse", sparse_run)
    data, settings = (x, x), replace(finetune.SETTINGS, loss="squared_error")
    recipe = Recipe.read("w8a8+80%b1x4", {"amounts": "erk", "observer": "minmax"})
    found = finetune.run(path, recipe, data, settings, target="wasm-relaxed")
    first, sparse, integers = given
    assert first[2].distillation == 0.0 and first[4] == () and first[1] is data
    begun, _, own, taken, context, teacher, labelled = sparse
    assert labelled == 10
    assert isinstance(begun, ir.Model) and own is data and taken == settings
    assert teacher == "trained 1" == found.teacher
    assert context.recipe == Recipe.read("fp32+80%b1x4", {"amounts": "erk"})
    config, _, slow, _, (taught,) = integers
    assert (config.weight_bits, config.weight_limit, config.observer) == (8, 63, "minmax")
    assert taught == "trained 1" and slow.sparsity == "kept" and slow.normalization == "none"
    assert (slow.epochs, slow.learning_rate) == (10, 2e-3)
    assert (found.model, found.pruned) == ("trained 3", "facts")
    given.clear()
    finetune.run(path, "fp32+80%", data, settings, teacher="earlier")  # type: ignore[arg-type]
    assert [arguments[-2:] for arguments in given] == [("earlier", 10)]
    assert isinstance(given[0][0], ir.Model)
    given.clear()
    # None of the sparse network's epochs have labels: the network that has learned them is pruned.
    finetune.run(path, "fp32+80%", data, settings, labelled=0)
    (_, (begun, *_, teacher, labelled)) = given
    assert (begun, teacher, labelled) == ("trained 1", "trained 1", 0)
    given.clear()
    found = finetune.run(path, "w4a8", data, settings, teacher="earlier")  # type: ignore[arg-type]
    assert found.model == "trained 1" and found.pruned is None and len(given) == 1


@pytest.mark.parametrize(
    ("epochs", "asked", "labelled"),
    [(100, None, 10), (40, None, 10), (12, None, 6), (1, None, 1), (28, 20, 20), (5, 5, 5)],
)
def test_labels_come_last(
    epochs: int, asked: int | None, labelled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for what prunes and trains, which name what they were given."""
    graph, source, x, context = made(tmp_path / "net.onnx", "fp32+80%")
    pruned, trained = [], []

    def prune_run(model: Any, _: Any, samples: Any, own: Context) -> tuple[str, str]:
        assert own.recipe.settings.distill is None
        pruned.append((model, str(own.recipe), samples["x"].shape))
        return "pruned", "facts"

    def train(*arguments: Any) -> str:
        trained.append(arguments)
        return f"trained {len(trained)}"

    monkeypatch.setattr(prune, "run", prune_run)
    monkeypatch.setattr(finetune, "train", train)
    context = replace(context, recipe=Recipe.read("fp32+80%", {"distill": 9}))
    images, labels = np.tile(x, (12, 1, 1, 1)), np.zeros(12 * len(x), np.int64)
    settings = replace(SETTINGS, epochs=epochs, loss="cross_entropy", distillation=0.5,
                       checkpoint=tmp_path)  # fmt: skip
    result = finetune.sparse(
        graph, source, (images, labels), settings, context, "teacher", asked  # type: ignore[arg-type]
    )  # fmt: skip
    assert result == ("trained 2", "facts") and pruned == [(graph, "fp32+80%", (512, 3, 8, 8))]
    (model, _, (inputs, none), blind, _, taught), last = trained
    assert (model, none) == ("pruned", None) and inputs["x"] is images and taught is graph
    assert blind == replace(settings, epochs=epochs - labelled, loss="squared_error",
                            distillation=1.0, sparsity="kept",
                            checkpoint=tmp_path / "outputs")  # fmt: skip
    model, _, (_, given), changed, _, taught = last
    assert (model, taught) == ("trained 1", "teacher") and given is labels
    assert changed == replace(settings, epochs=labelled, sparsity="kept",
                              checkpoint=tmp_path / "labels")  # fmt: skip
    # With none of them labelled there is one training, of what was pruned by what it was.
    trained.clear()
    result = finetune.sparse(
        graph, source, (images, labels), settings, context, "teacher", 0  # type: ignore[arg-type]
    )  # fmt: skip
    assert result == ("trained 1", "facts")
    ((model, _, (_, none), same, _, taught),) = trained
    assert (model, none) == ("pruned", None) and taught is graph
    assert same == replace(blind, epochs=epochs)
    # Without labels, too, as the settings say.
    trained.clear()
    result = finetune.sparse(graph, source, (images, None), settings, context)
    assert result == ("trained 1", "facts")
    ((model, _, (_, none), same, _, taught),) = trained
    assert (model, none) == ("pruned", None) and taught is graph
    assert same == replace(settings, sparsity="kept")


@pytest.mark.needs_torch
@pytest.mark.parametrize("pattern", ["60%", "1:4", "c40%"])
def test_training_ends_nearer_than_pruning_alone(pattern: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    graph, source, x, context = made(tmp_path / "net.onnx", f"fp32+{pattern}")
    settings = replace(SETTINGS, epochs=20, batch=8, learning_rate=0.02, normalization="none",
                       checkpoint=tmp_path / "state")  # fmt: skip
    labels = outputs(graph, x)
    given = replace(settings, distillation=0.5)
    found, facts = finetune.sparse(graph, source, (x, labels), given, context)
    once, _ = prune.run(graph, source, {"x": x}, context)
    far, near = (float(np.square(outputs(m, x) - labels).sum()) for m in (once, found))
    assert near < 0.9 * far
    if "c" not in pattern:
        assert set(facts.manifest["zeros"]) == {node.name for node in prunable(graph.graph, None)}
        for before, after in zip(prunable(once.graph, None), prunable(found.graph, None),
                                 strict=True):  # fmt: skip
            zeros = Layer.of(after).weight == 0
            assert np.array_equal(Layer.of(before).weight == 0, zeros)
            assert abs(zeros.mean() - {"60%": 0.6, "1:4": 0.75}[pattern]) < 0.02
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"outputs", "labels"}
    again, _ = finetune.sparse(graph, source, ({"x": x}, labels), given, context)
    assert np.array_equal(outputs(again, x), outputs(found, x))


@pytest.mark.parametrize(
    ("recipe", "changes", "told"),
    [
        ("fp32", {}, "recipe 'fp32' has no zeros"),
        ("w8a8+80%b1x4", {}, "has no zeros in float"),
        ("fp32+80%", {"sparsity": "2:4"}, "sparsity is '2:4' there, and '80%' in the recipe"),
        ("fp32+80%", {"epochs": 8}, "9 epochs with labels, of 8"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    recipe: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    graph, source, x, context = made(tmp_path / "net.onnx", recipe)
    with pytest.raises(UserError, match=told):
        finetune.sparse(graph, source, (x, None), replace(SETTINGS, **changes), context, None, 9)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("fp32", "'fp32' is the network as it is"),
        ("w8a16", "of 'w8a16' weights alone are rounded, which is not trained"),
        ("fp32+80%", "-1 epochs with labels"),
    ],
)
def test_what_is_refused_before_anything_is_trained(
    recipe: str, told: str, network: tuple[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "train", None)
    with pytest.raises(UserError, match=told):
        finetune.run(network[0], recipe, (network[1], None), SETTINGS, labelled=-1)
