"""Whole networks: compiled, executed on their target, held to the float reference."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgepipe import pipeline
from edgepipe.validation import validate

SHARED = Path(os.environ.get("EDGEPIPE_SHARED", Path(__file__).parents[3] / "shared")) / "models"

TRAINED = [
    "ad_autoencoder",
    "cifar_resnet20",
    "ic_resnet8",
    "ic_resnet8_large",
    "kws_dscnn",
    "mobilenet_v2_224",
    "squeezenet_v1_0_sparse",
    "ultraface_rfb320",
    "vww_mobilenetv1_025",
]
#: One per kind of network: convolutional, transformer with integer inputs, recurrent, image to
#: image, with gates. The whole zoo on every target is benchmarks/matrix.py.
ZOO = ["mobilenet-v1", "text-transformer", "lstm", "espcn", "efficientnet-b0"]
SMALL = ["ad_autoencoder", "kws_dscnn", "ultraface_rfb320"]


def check(model: str | Path, target: str, folder: Path) -> None:
    bundle = pipeline.compile(model, target=target, output=folder / "bundle")
    report = validate(bundle, model=model)
    assert report.ok, report
    memory = bundle.manifest["memory"]
    assert memory["arena_bytes"] <= 1.15 * memory["peak_live_bytes"]


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize("name", TRAINED)
def test_trained_networks_on_this_machine(name: str, tmp_path: Path) -> None:
    check(SHARED / f"{name}.onnx", "host", tmp_path)


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "target",
    [
        pytest.param("wasm-simd", marks=pytest.mark.needs_node),
        pytest.param("wasm-relaxed", marks=pytest.mark.needs_wasmtime),
        pytest.param("raspberry-pi-4", marks=pytest.mark.needs_qemu),
        pytest.param("raspberry-pi-5", marks=pytest.mark.needs_qemu),
        pytest.param("raspberry-pi-3-32", marks=pytest.mark.needs_qemu),
        pytest.param("jetson-tx2-cpu", marks=pytest.mark.needs_qemu),
    ],
)
def test_trained_networks_on_other_targets(name: str, target: str, tmp_path: Path) -> None:
    check(SHARED / f"{name}.onnx", target, tmp_path)


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize(
    "target", ["x86-64-v3", pytest.param("wasm-simd", marks=pytest.mark.needs_node)]
)
def test_zoo_networks(name: str, target: str, tmp_path: Path) -> None:
    check(name, target, tmp_path)


@pytest.mark.slow
@pytest.mark.needs_node
def test_webassembly_stays_small(tmp_path: Path) -> None:
    """One .wasm of at most 40 KB without weights for MobileNetV1, and no imports."""
    pytest.importorskip("torch", reason="the network is exported from torch")
    bundle = pipeline.compile("mobilenet-v1", target="wasm-simd", output=tmp_path / "bundle")
    assert bundle.file("model.wasm").stat().st_size <= 40 * 1024
