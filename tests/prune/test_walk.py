"""Moments of all layers in one pass are those of each layer by itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import quantize
from edgepipe.onnx_session import open_session
from edgepipe.prune import walk
from edgepipe.prune.layers import set_weight
from edgepipe.quantization.layers import Layer, prunable
from edgepipe.sparsity.pattern import Pattern
from tests.prune.test_channels import Network, canonical, residual


def run_to(model: ir.Model, name: str, sample: dict[str, np.ndarray]) -> np.ndarray:
    part = model.clone()
    part.graph.outputs[:] = [v for n in part.graph for v in n.outputs if v.name == name]
    found: np.ndarray = open_session(quantize.onnx_bytes(part)).run(None, sample)[0]
    return found


def test_moments_follow_what_was_pruned_before() -> None:
    random = np.random.default_rng(1)
    data = [{"x": random.standard_normal((1, 3, 8, 8), dtype=np.float32)} for _ in range(3)]
    dense = canonical(residual(Network()))
    pruned = dense.clone()
    layers = prunable(pruned.graph, Pattern(kept=2, of=4))
    assert len(layers) == 3
    for node, gram in walk.moments(dense.graph, pruned.graph, layers, data):
        layer = Layer.of(node)
        x, y = (
            np.concatenate([take(run_to(model, name, s)) for s in data]).astype(np.float64)
            for model, name, take in (
                (pruned, node.inputs[0].name, lambda a, layer=layer: layer.patches(a)[0]),
                (dense, node.outputs[0].name, lambda a, layer=layer: layer.rows(a)[0]),
            )
        )
        cov = np.cov(x.T, bias=True)
        cross = (y - y.mean(0)).T @ (x - x.mean(0)) / len(x)
        np.testing.assert_allclose(gram.hessian[0], cov, atol=1e-4 * np.abs(cov).max())
        np.testing.assert_allclose(gram.cross[0], cross, atol=1e-4 * np.abs(cross).max())
        np.testing.assert_allclose(gram.mean_y[0], y.mean(0), atol=1e-4)
        stays = np.random.default_rng(2).random((layer.outputs, x.shape[1])) < 0.5
        set_weight(node, stays, gram)  # the next layers must see it
        changed = run_to(pruned, node.outputs[0].name, data[0])
        assert np.abs(changed - run_to(dense, node.outputs[0].name, data[0])).max() > 1e-2


def test_fewer_samples_where_they_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = canonical(residual(Network())).graph
    assert walk.affordable(graph, 128) == 128
    monkeypatch.setattr(walk, "MEMORY_BYTES", 300_000)
    # The most that is alive at once: 40 channels of 16 x 16 beside what made them, 4 bytes each.
    each = 2 * 4 * (40 * 256 + 40 * 64)
    assert walk.affordable(graph, 128) == 300_000 // each
    monkeypatch.setattr(walk, "MEMORY_BYTES", 1)
    assert walk.affordable(graph, 128) == 1
