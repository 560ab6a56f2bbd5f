"""Amounts by layer, from a recipe to zeros."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import passes, prune
from edgepipe.context import Context
from edgepipe.data import Samples
from edgepipe.errors import UserError
from edgepipe.importer import load
from edgepipe.importer.source import Source
from edgepipe.prune import amounts, cost, walk
from edgepipe.prune.layers import equations, kept
from edgepipe.quantization.layers import Layer, prunable
from edgepipe.recipe import Recipe
from edgepipe.sparsity import pruning
from edgepipe.sparsity.amounts import erk
from edgepipe.sparsity.pattern import Pattern
from edgepipe.target import Target
from tests.prune.test_channels import Network, canonical, residual


def plain(n: Network) -> ir.Model:
    """Convolutions of other shapes each."""
    y = n.conv(n.conv(n.conv("x", 8, 3, 3), 32, 8, 3), 16, 32)
    return n.model(n.conv(y, 32, 16, 3), 1, 32, 8, 8)


def made(path: Path, recipe: str) -> tuple[ir.Model, Source, np.ndarray, Context]:
    """``plain`` in a file: its graph, itself, inputs, and what is to become of it."""
    ir.save(plain(Network()), path)
    source = load(path)
    context = Context(Target.load("x86-64-v3"), Recipe.parse(recipe))
    x = np.random.default_rng(1).standard_normal((48, 3, 8, 8), dtype=np.float32)
    return passes.run(source.model, context), source, x, context


def pruned(
    path: Path,
    data: bool = True,
    model: Callable[[Network], ir.Model] = residual,
    recipe: str = "fp32+70%",
    target: str = "x86-64-v3",
    **settings: str,
) -> tuple[ir.Model, prune.Pruned]:
    """A network, pruned by the recipe."""
    ir.save(model(Network()), path)
    random = np.random.default_rng(1)
    x = random.standard_normal((16, 1, 3, 8, 8), dtype=np.float32)
    samples = Samples("x", len(x), lambda: ({"x": a} for a in x))
    context = Context(Target.load(target), Recipe.read(recipe, settings))
    source = load(path)
    graph = passes.run(source.model, context)
    model, facts = prune.run(graph, source, samples if data else None, context)
    assert facts is not None
    return model, facts


def spent(model: ir.Model, budget: str) -> float:
    target = Target.load("x86-64-v3")
    layers = prunable(model.graph, Pattern(percent=70))
    masks = [Layer.of(n).matrix(Layer.of(n).weight)[0] != 0 for n in layers]
    return sum(cost.of(n, m, budget, target) for n, m in zip(layers, masks, strict=True))


@pytest.mark.parametrize("budget", ["macs", "bytes", "latency"])
def test_a_search_spends_what_uniform_amounts_do(budget: str, tmp_path: Path) -> None:
    uniform, _ = pruned(tmp_path / "n.onnx")
    model, facts = pruned(tmp_path / "n.onnx", amounts="search", budget=budget)
    assert spent(model, budget) <= 1.01 * spent(uniform, budget)
    assert len({round(z, 2) for z in facts.manifest["zeros"].values()}) > 1
    # Positive control: with every weight it takes more.
    dense = canonical(residual(Network()))
    assert spent(uniform, budget) < 0.95 * spent(dense, budget)


def test_erk_prunes_layers_by_their_shapes(tmp_path: Path) -> None:
    model, facts = pruned(tmp_path / "n.onnx", data=False, model=plain, amounts="erk")
    shapes = [Layer.of(n).weight_shape for n in prunable(model.graph, Pattern(percent=70))]
    wanted = erk(shapes, 70.0)
    assert max(wanted) - min(wanted) > 10
    found = [100 * zeros for zeros in facts.manifest["zeros"].values()]
    np.testing.assert_allclose(found, wanted, atol=0.2)


def test_a_search_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --calibration, or use amounts"):
        pruned(tmp_path / "n.onnx", data=False, amounts="search")


def test_auto_saves_the_time_that_is_asked_for(tmp_path: Path) -> None:
    dense = canonical(plain(Network()))
    model, facts = pruned(tmp_path / "n.onnx", model=plain, recipe="fp32+auto40%")
    assert spent(model, "latency") <= 0.6 * spent(dense, "latency")
    names = [n.name for n in prunable(model.graph, Pattern(percent=70))]
    assert list(facts.manifest["patterns"]) == names
    less, _ = pruned(tmp_path / "n.onnx", model=plain, recipe="fp32+auto20%")
    assert spent(model, "latency") < spent(less, "latency") <= 0.8 * spent(dense, "latency")


def test_time_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"by estimate \d+ % can at most"):
        pruned(tmp_path / "n.onnx", model=plain, recipe="fp32+auto99%")


def test_zeros_save_no_time_on_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="GPUs have no sparse kernels"):
        pruned(tmp_path / "n.onnx", recipe="fp32+auto", target="jetson-tx2")


def test_what_a_search_measures_is_what_pruning_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """By some outputs: as all of a layer's places would be chosen, and better than at first."""
    net = Network()
    graph = canonical(net.model(net.conv(net.conv("x", 16, 3), 96, 16), 1, 96, 8, 8))
    random = np.random.default_rng(1)
    data = [{"x": random.standard_normal((1, 3, 8, 8), dtype=np.float32)} for _ in range(64)]
    layers = prunable(graph.graph, Pattern(kept=1, of=4))
    ((node, gram),) = walk.moments(graph.graph, graph.graph, layers, data)
    layer = Layer.of(node)
    measured = amounts._Measured(layer, gram)
    assert len(measured.rows) == 64 and len(measured.some) == 8
    for text in ("1:4", "1:4v8", "80%"):
        pattern = Pattern.parse(text, "")
        found = measured.distortion(pattern)
        some = measured.rows[measured.some]
        weight = layer.matrix(layer.weight)[0][some].astype(np.float64)
        hessian, _ = equations(layer, gram)
        stays = kept(layer, pattern, gram)[some]
        left = pruning.refit(weight, stays, hessian, weight @ hessian) - weight
        power = np.sum((weight @ hessian) * weight)
        whole = float(np.sum((left @ hessian) * left) / power)
        assert found == pytest.approx(whole, rel=0.15 if pattern.of else 0.4)
        with monkeypatch.context() as patch:
            patch.setattr(pruning, "settled", lambda kept, *_: kept)
            assert found < 0.9 * measured.distortion(pattern)
