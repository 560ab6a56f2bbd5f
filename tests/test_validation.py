"""Validation: right bundles pass, wrong ones fail, and the report says what it judged by."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import dense
import numpy as np
import pytest

from edgepipe.bundle import Bundle
from edgepipe.errors import UserError
from edgepipe.judge import floor_db, judge_steps
from edgepipe.recipe import Recipe
from edgepipe.tally import StepTally
from edgepipe.validation import Report, _has_float_islands, validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dense")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return dense.save_model(folder / "dense.onnx", *dense.weights())


@pytest.fixture(scope="module")
def right(folder: Path, model: Path) -> Bundle:
    return dense.build(folder, model, *dense.weights())


def labelled(path: Path, x: np.ndarray) -> Path:
    w, b = dense.weights()
    np.savez(path, x=x, labels=np.argmax(x @ w.T + b, axis=1))
    return path


def test_golden_data_need_no_original(right: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepipe.importer.load", None)
    report = validate(right)
    assert report.ok
    assert report.synthetic
    assert report.outputs[0].snr_db > 120
    assert "golden" in report.data
    assert "says nothing of accuracy" in str(report)


def test_labelled_data_give_the_accuracy_of_both(right: Bundle, tmp_path: Path) -> None:
    report = validate(right, labelled(tmp_path / "d.npz", dense.data()), max_top1_drop=0)
    assert report.ok
    assert (report.accuracy, report.reference_accuracy) == (1.0, 1.0)
    assert report.runs == 40
    assert not report.synthetic
    assert report.outputs[0].top1_agreement == 1.0


def test_a_named_model_without_data_is_run_on_seeded_inputs(right: Bundle, model: Path) -> None:
    report = validate(right, model=model)
    assert report.ok
    assert report.synthetic
    assert "seeds" in report.data


def swapped(w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = [1, 0, *range(2, dense.CLASSES)]
    return w[order], b[order]


def scaled(w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = np.float32([1] * 9 + [1.001])
    return w * scale[:, None], b * scale


@pytest.mark.slow
@pytest.mark.parametrize("damage", [swapped, scaled])
@pytest.mark.parametrize("source", ["golden", "npz"])
def test_positive_control(folder: Path, model: Path, tmp_path: Path, damage, source: str) -> None:
    """Two swapped channels, and one channel off by a thousandth, must both fail."""
    wrong = dense.build(folder, model, *damage(*dense.weights()), name=f"wrong-{damage.__name__}")
    data = None if source == "golden" else labelled(tmp_path / "d.npz", dense.data())
    report = validate(wrong, data)
    assert not report.ok
    assert report.outputs[0].snr_db < 100
    assert "scores: SNR" in report.failures[0]
    if damage is swapped and source == "npz":
        assert report.accuracy is not None
        assert report.accuracy < 1.0
        lost = validate(wrong, data, min_snr_db=-100, max_top1_drop=0.1)
        assert "accuracy drops" in lost.failures[0]


@pytest.mark.slow
def test_amplified_rounding_is_judged_by_float64(tmp_path: Path) -> None:
    """Terms of 3e4 that cancel leave both engines 50 dB of noise: no fault of the bundle."""
    w, b = dense.weights(cancelling=3e4)
    model = dense.save_model(tmp_path / "dense.onnx", w, b)
    built = dense.build(tmp_path, model, w, b)
    x = dense.data(spread=1e-5)
    report = validate(built, {"x": x})
    (output,) = report.outputs
    assert output.snr_db < 100
    assert output.snr64_db is not None
    assert output.reference_snr64_db is not None
    assert output.snr64_db < 100
    assert report.ok, report
    assert not validate(built, {"x": x}, min_snr_db=100).ok  # an explicit floor is meant
    # Positive control: noise of the bundle's own, on top of the amplified rounding, fails.
    noisy = dense.build(tmp_path, model, w * np.float32(1 + 3e-3), b, name="noisy")
    report = validate(noisy, {"x": x})
    assert not report.ok
    assert "further from a float64 run" in report.failures[0]


def test_another_model_is_refused(right: Bundle, tmp_path: Path) -> None:
    w, b = dense.weights()
    other = dense.save_model(tmp_path / "dense.onnx", w, b + 1)
    with pytest.raises(UserError, match="is not the model that the bundle was compiled from"):
        validate(right, model=other)


def test_a_model_that_is_gone_is_asked_for(tmp_path: Path) -> None:
    model = dense.save_model(tmp_path / "gone.onnx", *dense.weights())
    built = dense.build(tmp_path, model, *dense.weights())
    model.unlink()
    assert validate(built).ok
    with pytest.raises(UserError, match=r"'gone\.onnx' is neither here nor beside.*--model"):
        validate(built, {"x": dense.data()})


def test_top1_needs_classes(right: Bundle, model: Path) -> None:
    report = validate(right, {"x": dense.data()}, model=model, max_top1_drop=0)
    assert report.ok  # without labels: the share of rows with another winner
    assert report.accuracy is None


def test_the_report_is_json(right: Bundle) -> None:
    report = validate(right)
    text = json.dumps(report.to_json(), allow_nan=False)
    assert json.loads(text)["ok"] is True
    assert json.loads(text)["outputs"][0]["name"] == "scores"
    exact = Report("b", "local", "d", False, 1, report.outputs, float("inf"))
    assert '"inf"' in json.dumps(exact.to_json(), allow_nan=False)


def test_the_bundle_has_the_method(right: Bundle) -> None:
    assert right.validate(runner="local").ok


def stepped(share_off: float, distance: float = 2.5) -> StepTally:
    """1000 values between −1 and 3, a share of them ``distance`` steps of 8 bits off."""
    reference = {"y": np.linspace(-1, 3, 1000, dtype=np.float32)}
    result = {"y": reference["y"].copy()}
    result["y"][: int(1000 * share_off)] += np.float32(distance * 4 / 255)
    tally = StepTally({}, 8)
    tally.add(result, reference)
    return tally


@pytest.mark.parametrize(
    ("share_off", "distance", "ok"),
    [(0.0, 0, True), (0.001, 2.5, True), (0.002, 2.5, False), (1.0, 1.0, True), (1.0, 1.1, False)],
)
def test_one_value_in_a_thousand_may_be_further_than_a_step(
    share_off: float, distance: float, ok: bool
) -> None:
    failures = judge_steps(Recipe("w8a8"), stepped(share_off, distance).reports())
    assert (failures == []) is ok
    assert ok or "within one step of the Q/DQ model" in failures[0]


def test_the_step_is_the_scale_where_that_is_known_and_wider_for_fewer_bits() -> None:
    reference = {"y": np.float32([0, 1.5])}
    for known, bits, step in (({"y": 0.25}, 8, 0.25), ({}, 8, 1.5 / 255), ({}, 4, 0.1)):
        tally = StepTally(known, bits)
        tally.add(reference, reference)
        assert tally.reports()[0].step == pytest.approx(step)


def test_float_activations_are_judged_by_their_noise() -> None:
    assert judge_steps(Recipe("w8a16"), stepped(0.0).reports()) == []
    assert "against the Q/DQ model" in judge_steps(Recipe("w8a16"), stepped(0.01, 0.5).reports())[0]


def test_a_bundle_may_be_as_far_as_references_are_from_each_other() -> None:
    """Where rounding is amplified; what is further still fails, and where they agree."""
    w8a8, far = Recipe("w8a8"), stepped(0.3).reports()
    assert judge_steps(w8a8, far, between=stepped(0.3).reports()) == []
    assert judge_steps(w8a8, far, between=stepped(0.1).reports()) == []  # 4.8 dB, of 6
    assert judge_steps(w8a8, far, between=stepped(0.05).reports()) != []
    assert judge_steps(w8a8, far, between=stepped(0.0).reports()) != []
    nothing = stepped(1.0, 300.0).reports()  # references that have nothing in common prove nothing
    assert judge_steps(w8a8, nothing, between=nothing) != []


@pytest.mark.parametrize(
    ("arithmetic", "op_type", "islands"),
    [("float32", "Softmax", True), ("float32", "QuantizeLinear", False), ("int8", "Conv", False)],
)
def test_only_float_operators_between_integers_are_islands(
    arithmetic: str, op_type: str, islands: bool
) -> None:
    kernels = [{"arithmetic": arithmetic, "op_type": op_type}]
    bundle = SimpleNamespace(manifest={"kernels": kernels})
    assert _has_float_islands(cast(Bundle, bundle)) is islands


def test_floors_by_recipe() -> None:
    assert floor_db(Recipe("fp32"), synthetic=True) == 100
    assert floor_db(Recipe("fp16"), synthetic=False) == 40
    assert floor_db(Recipe("w4a4"), synthetic=False) == 10
    assert floor_db(Recipe("w4a4"), synthetic=True) is None


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ("os:getpid", "is code, which is not run unasked"),
        ("hostile:factory", "is code, which is not run unasked"),
        ("../dense.onnx", "is neither here nor beside the bundle"),
        ("/etc/hostname", "is neither here nor beside the bundle"),
    ],
)
def test_a_manifest_cannot_have_code_run_or_files_read(
    right: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, origin: str, said: str
) -> None:
    (tmp_path / "hostile.py").write_text("raise SystemExit('run')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    source = {**right.manifest["source"], "origin": origin}
    foreign = Bundle(right.path, {**right.manifest, "source": source})
    with pytest.raises(UserError, match=said):
        validate(foreign, labelled(tmp_path / "d.npz", dense.data()))
