"""Whole networks in integers: every product audited, the result that of the Q/DQ model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgepipe import pipeline
from edgepipe.recipe import Recipe, Settings
from edgepipe.validation import validate

SHARED = Path(os.environ.get("EDGEPIPE_SHARED", Path(__file__).parents[3] / "shared")) / "models"

TARGETS = [
    pytest.param("host", "local"),
    pytest.param("wasm-simd", "node", marks=pytest.mark.needs_node),
    pytest.param("wasm-relaxed", "wasmtime", marks=pytest.mark.needs_wasmtime),
    pytest.param("raspberry-pi-4", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("raspberry-pi-5", "qemu", marks=pytest.mark.needs_qemu),
    pytest.param("raspberry-pi-3-32", "qemu", marks=pytest.mark.needs_qemu),
]

#: Rounding without a fit: what is computed is tested here, not how well.
PLAIN = Settings(methods=(), max_samples=4)


def check(name: str, target: str, runner: str, format: str, folder: Path) -> None:
    model = SHARED / f"{name}.onnx"
    recipe = Recipe(format, PLAIN)
    bundle = pipeline.compile(model, target=target, recipe=recipe, output=folder / "bundle")
    products = [kernel for kernel in bundle.manifest["kernels"] if kernel["macs"]]
    assert products
    assert all(kernel["arithmetic"].startswith("int8") for kernel in products)
    assert all(kernel["accumulator"] == "int32" for kernel in products)
    report = validate(bundle, model=model, runner=runner)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize("name", ["ad_autoencoder", "kws_dscnn", "ic_resnet8"])
@pytest.mark.parametrize(("target", "runner"), TARGETS)
def test_eight_bits_on_every_kind_of_target(
    name: str, target: str, runner: str, tmp_path: Path
) -> None:
    check(name, target, runner, "w8a8", tmp_path)


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize("name", ["mobilenet_v2_224", "squeezenet_v1_0_sparse", "cifar_resnet20"])
def test_larger_networks_on_this_machine(name: str, tmp_path: Path) -> None:
    check(name, "host", "local", "w8a8", tmp_path)


@pytest.mark.slow
@pytest.mark.needs_shared
@pytest.mark.parametrize(("target", "runner"), TARGETS)
def test_four_bits_shrink_the_weights(target: str, runner: str, tmp_path: Path) -> None:
    check("ic_resnet8", target, runner, "w4a8", tmp_path)
    size = (tmp_path / "bundle" / "weights.bin").stat().st_size
    assert size < 0.16 * 4 * 78666  # parameters of the network in float32
