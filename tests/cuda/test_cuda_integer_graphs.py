"""Whole Q/DQ graphs on a GPU's integers, executed on the CPU: bit for bit what the interpreter
computes, in templates and in the general form."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import onnx
import pytest
from lowering import integer_graphs
from lowering.test_integers import compiled, differences, expected

from cuda import stub
from edgepipe.gpu import VARIABLE

pytestmark = [pytest.mark.slow, pytest.mark.needs_cuda_toolkit]


#: Those without weights of four bits, which GPUs do not offer.
LAYERS = (
    integer_graphs.arithmetic,
    integer_graphs.pools,
    integer_graphs.tables,
    integer_graphs.movement,
    integer_graphs.resized,
    partial(integer_graphs.resized, addend=True),
)


@pytest.mark.parametrize("seed", [11, 12, 13])
def test_layers(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = integer_graphs.Graph(seed)
    for layer in LAYERS:
        layer(g)
    path, inputs = tmp_path / "model.onnx", g.feeds
    onnx.save(g.model(), path)
    bundle = compiled(path, "jetson-xavier-nx", tmp_path)
    kernels = " ".join(k["kernel"] for k in bundle.manifest["kernels"])
    assert "integer_" in kernels and "q_bilinear" in kernels
    library = stub.executing((bundle.path / "model.cu").read_text("utf-8"), tmp_path)
    monkeypatch.setenv(VARIABLE, str(library))
    monkeypatch.setenv("STUB_CAPABILITY", "72")
    monkeypatch.setenv("STUB_DRIVER", "12060")
    assert not differences(expected(path, inputs), bundle.run(inputs, "cuda-local"))
