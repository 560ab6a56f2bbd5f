"""Whole networks in a GPU's formats: kernels executed on the CPU against the float model."""

from __future__ import annotations

from pathlib import Path

import pytest

from cuda import stub
from edgepipe import pipeline
from edgepipe.bundle import Bundle
from edgepipe.gpu import VARIABLE
from edgepipe.validation import validate

pytestmark = [pytest.mark.slow, pytest.mark.needs_cuda_toolkit]


def executed(bundle: Bundle, folder: Path, patch: pytest.MonkeyPatch, least_db: float) -> None:
    """The bundle's own kernels agree with its reference, on the CPU."""
    library = stub.executing((bundle.path / "model.cu").read_text("utf-8"), folder)
    patch.setenv(VARIABLE, str(library))
    report = validate(bundle, min_snr_db=least_db, runner="cuda-local")
    assert report.ok, report
    assert validate(bundle, runner="cuda-local").ok
    assert not validate(bundle, min_snr_db=90, runner="cuda-local").ok


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("jetson-nano", "fp16"), ("jetson-nano", "w8a16"), ("jetson-orin-nano", "fp16")],
)
def test_halves_in_memory(
    target: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    bundle = pipeline.compile("digits", target=target, recipe=recipe, output=path)
    monkeypatch.setenv("STUB_CAPABILITY", "87")
    monkeypatch.setenv("STUB_DRIVER", "12060")
    single = pipeline.compile("digits", target="jetson-nano", output=tmp_path / "single")
    # Tiles of tensor cores hold more weights of zero.
    for part in ("weights_bytes", "arena_bytes") if target == "jetson-nano" else ("arena_bytes",):
        assert bundle.manifest["memory"][part] < 0.6 * single.manifest["memory"][part]
    executed(bundle, tmp_path, monkeypatch, 45)


def test_codes_in_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bundle"
    bundle = pipeline.compile("digits", target="jetson-orin-nano", recipe="w8a8", output=path)
    products = [k for k in bundle.manifest["kernels"] if k["macs"]]
    assert products
    assert {(k["arithmetic"], k["accumulator"]) for k in products} == {("int8", "int32")}
    monkeypatch.setenv("STUB_CAPABILITY", "87")
    monkeypatch.setenv("STUB_DRIVER", "12060")
    text = (path / "model.cu").read_text("utf-8")
    for right, source in [(True, text), (False, text.replace("__float2int_rn(", "(int)("))]:
        folder = tmp_path / str(right)
        folder.mkdir()
        monkeypatch.setenv(VARIABLE, str(stub.executing(source, folder)))
        assert validate(bundle, runner="cuda-local").ok is right
