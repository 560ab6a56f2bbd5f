"""Random networks compiled for each kind of target and executed there, against ONNX Runtime."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgepipe import pipeline, runners
from edgepipe.metrics import snr_db
from tests.end_to_end.graphs import random_network

#: Both sides round in float32 but in another order; networks of about 16 layers.
FLOOR_DB = 95.0

#: Seeds are fixed; a longer run: EDGEPIPE_RANDOM_NETWORKS=500 pytest tests/end_to_end
COUNT = int(os.environ.get("EDGEPIPE_RANDOM_NETWORKS", "30"))

TARGETS = [
    pytest.param("host", COUNT),
    pytest.param("x86-64-v3", max(COUNT // 5, 3)),
    pytest.param("wasm-simd", max(COUNT // 5, 3), marks=pytest.mark.needs_node),
    pytest.param("wasm-relaxed", max(COUNT // 10, 2), marks=pytest.mark.needs_wasmtime),
    pytest.param("raspberry-pi-4", max(COUNT // 5, 3), marks=pytest.mark.needs_qemu),
    pytest.param("raspberry-pi-3-32", max(COUNT // 5, 3), marks=pytest.mark.needs_qemu),
]


def reference(model: onnx.ModelProto, x: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    # Its fusion of Pad into pooling refuses some of these networks.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [o.name for o in model.graph.output]
    return dict(zip(names, session.run(None, {"x": x}), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("target", "count"), TARGETS)
def test_random_networks(target: str, count: int, tmp_path: Path) -> None:
    wrong = []
    for seed in range(count):
        model = random_network(seed)
        path = tmp_path / "network.onnx"
        onnx.save(model, path)
        bundle = pipeline.compile(path, target=target, output=tmp_path / "bundle")
        dims = model.graph.input[0].type.tensor_type.shape.dim
        shape = [d.dim_value for d in dims]
        x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        got = runners.run(bundle, {"x": x})
        for name, expected in reference(model, x).items():
            assert got[name].shape == expected.shape
            if not np.array_equal(expected, got[name]):
                snr = snr_db(got[name], expected)
                if snr < FLOOR_DB:
                    wrong.append(f"seed {seed}, output {name}: {snr:.1f} dB")
    assert not wrong, wrong


def test_the_comparison_sees_a_wrong_network() -> None:
    """Positive control: the result for another input is below the floor."""
    model = random_network(1)
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    numbers = np.random.default_rng(0)
    first, second = (numbers.standard_normal(shape, dtype=np.float32) for _ in range(2))
    good, other = reference(model, first), reference(model, second)
    assert min(snr_db(other[name], good[name]) for name in good) < FLOOR_DB
