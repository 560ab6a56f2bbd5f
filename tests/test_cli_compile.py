"""``edgepipe compile`` end to end on the trained digits: three targets, every option, bad ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import edgepipe
from edgepipe.blob import Blob
from edgepipe.bundle import Bundle
from edgepipe.cli import main
from edgepipe.cli.compile import _stage_text
from edgepipe.codegen import driver
from edgepipe.codegen.plan import Plan
from tests.fuzz import seeds

CLI = [sys.executable, "-m", "edgepipe"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "host"
    assert main(["compile", "digits", "--target", "host", "-o", str(folder), "--quiet"]) == 0
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("target", "runner"),
    [
        ("host", "local"),
        pytest.param("raspberry-pi-4", "qemu", marks=[pytest.mark.needs_qemu, pytest.mark.slow]),
        pytest.param("wasm-simd", "node", marks=[pytest.mark.needs_node, pytest.mark.slow]),
        pytest.param(
            "wasm-relaxed", "wasmtime", marks=[pytest.mark.needs_wasmtime, pytest.mark.slow]
        ),
    ],
)
def test_compile_validate_bench(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, target: str, runner: str
) -> None:
    out = str(tmp_path / "digits")
    code, text, _ = run(capsys, "compile", "digits", "--target", target, "-o", out)
    assert code == 0
    for word in ("bundle", "weights.bin", "arena", "kernels", "time", target):
        assert word in text
    common = ("validate", out, "--data", "digits", "--runner", runner, "--max-top1-drop", "0")
    code, text, _ = run(capsys, *common, "--json")
    report = json.loads(text)
    assert code == 0
    assert report["ok"]
    assert report["accuracy"] == report["reference_accuracy"] > 0.97
    assert report["outputs"][0]["snr_db"] >= 100
    code, text, _ = run(capsys, "bench", out, "--runner", runner, "--runs", "10", "--json")
    assert code == 0
    assert json.loads(text)["ours"]["emulated"] is (runner == "qemu")


@pytest.mark.slow
def test_json_is_all_there_is_on_stdout(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, dump = tmp_path / "digits", tmp_path / "dump"
    arguments = ["compile", "digits", "--target", "host", "-o", str(out), "--json", "--explain"]
    code, text, err = run(capsys, *arguments, "--dump", str(dump))
    assert (code, err) == (0, "")
    result = json.loads(text)
    assert result["bundle"] == str(out)
    assert result["manifest"]["files"]
    assert all(stage["seconds"] >= 0 for stage in result["stages"])
    assert isinstance(result["notes"], list)
    assert any(dump.iterdir())


@pytest.mark.slow
def test_explain_says_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "digits")
    arguments = ("compile", "digits", "--target", "host", "-o", out, "--explain")
    code, text, _ = run(capsys, *arguments)
    assert code == 0
    notes = json.loads(run(capsys, *arguments, "--json")[1])["notes"]
    expected = [f"{n['stage']}: {n['subject']}: {n['text']}" for n in notes]
    assert text.splitlines()[: len(notes)] == expected
    assert notes or "nothing to explain" in text


@pytest.mark.slow
def test_progress_is_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "digits")
    code, _, err = run(capsys, "compile", "digits", "--target", "host", "-o", out)
    assert code == 0
    assert len(err.splitlines()) >= 5
    assert "\r" not in err
    assert "\x1b" not in err
    assert run(capsys, "compile", "digits", "--target", "host", "-o", out, "--quiet") == (0, "", "")


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(host: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    command = [*CLI, "compile", "digits", "--target", "host", "-o", str(again), "--quiet"]
    subprocess.run(command, check=True, cwd=tmp_path)  # another process, another folder
    assert hashes(again) == hashes(host)


@pytest.mark.slow
def test_a_batch_and_a_prefix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "digits")
    options = ["--shape", "image=3,1,8,8", "--prefix", "net"]
    code, _, _ = run(capsys, "compile", "digits", "--target", "host", "-o", out, *options)
    assert code == 0
    bundle = edgepipe.Bundle.open(out)
    assert bundle.inputs[0].shape == (3, 1, 8, 8)
    assert "net_run" in (Path(out) / "model.h").read_text(encoding="utf-8")
    report = bundle.validate(data="digits")
    assert report.ok
    assert report.runs == 150


@pytest.mark.slow
def test_python_says_the_same(host: Path, tmp_path: Path) -> None:
    bundle = edgepipe.compile("digits", target="host", output=tmp_path / "digits")
    assert hashes(bundle.path) == hashes(host)
    images = np.zeros((5, 1, 8, 8), np.float32)
    assert bundle.run({"image": images})["logits"].shape == (5, 10)
    assert bundle.validate().ok


@pytest.mark.slow
def test_config_and_settings_reach_the_target(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "build.toml").write_text(
        "model = 'digits'\ntarget = 'x86-64-v3'\noutput = 'bundle'\n"
        "[set]\ntarget.link.zig_target = 'x86_64-linux-gnu.2.31'\n",
        encoding="utf-8",
    )
    assert run(capsys, "compile", "--config", str(tmp_path / "build.toml"), "--quiet")[0] == 0
    bundle = edgepipe.Bundle.open(tmp_path / "bundle")
    assert bundle.target.name == "x86-64-v3"
    assert bundle.target.link.zig_target == "x86_64-linux-gnu.2.31"


def test_what_is_no_bundle_is_not_replaced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work", encoding="utf-8")
    code, _, err = run(capsys, "compile", "digits", "--target", "host", "-o", str(mine), "--quiet")
    assert code == 2
    assert "is not a bundle, so it is not replaced" in err
    assert (mine / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nowhere.onnx", "no such file"),
        ("text.onnx", "text.onnx"),
        ("digts", "did you mean 'digits'"),
        ("no.such.module:factory", "no.such.module"),
    ],
)
def test_bad_models_are_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.onnx").write_text("not a model", encoding="utf-8")
    code, out, err = run(capsys, "compile", model, "--target", "host", "--quiet")
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1, err
    assert [p.name for p in tmp_path.iterdir()] == ["text.onnx"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reading the model", "choosing kernels", "compiling", "link"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, stage: str) -> None:
    process = subprocess.Popen(
        [*CLI, "compile", "digits", "--target", "host", "-o", "bundle"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(stage):
            os.kill(process.pid, signal.SIGINT)
            break
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 2, rest
    assert rest.endswith("error: interrupted; nothing was written\n")
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgepipe.bundle_folder._fill", full)
    out = str(tmp_path / "digits")
    code, _, err = run(capsys, "compile", "digits", "--target", "host", "-o", out, "--quiet")
    assert code == 2
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_quantized_bundle_by_config_and_recipe_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "mine.toml").write_text(
        "format = 'w4a8'\noverrides = [{match = 'Gemm', format = 'float'}]\n", encoding="utf-8"
    )
    np.savez(tmp_path / "data.npz", image=np.random.default_rng(0).random((40, 1, 8, 8)) * 16)
    (tmp_path / "build.toml").write_text(
        "model = 'digits'\ntarget = 'host'\noutput = 'bundle'\nrecipe = 'mine.toml'\n"
        "calibration = 'data.npz'\nsamples = 20\nemit = ['onnx']\n",
        encoding="utf-8",
    )
    arguments = ("compile", "--config", str(tmp_path / "build.toml"))
    code, text, err = run(capsys, *arguments)
    assert code == 0
    assert "w4a8 with overrides, max_samples" in text
    assert "20 samples of data.npz (40 runs)" in text
    assert "warning" not in err
    bundle = edgepipe.Bundle.open(tmp_path / "bundle")
    assert (tmp_path / "bundle" / "model.qdq.onnx").is_file()
    assert bundle.recipe.settings.max_samples == 20
    assert bundle.recipe.settings.overrides[0].match == "Gemm"
    result = json.loads(run(capsys, *arguments, "--json", "--explain")[1])
    assert result["warnings"] == []
    assert any("kept float by an override" in note["text"] for note in result["notes"])
    assert result["manifest"]["recipe_settings"]["overrides"] == [
        {"match": "Gemm", "format": "float"}
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("samples = true", "'samples' cannot be true or false"),
        ("emit = [3]", "'emit' must be a list of formats"),
        ("calibration = 3", "'calibration' cannot be a whole number"),
    ],
)
def test_mistakes_in_a_config_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, said: str
) -> None:
    path = tmp_path / "build.toml"
    path.write_text(f"model = 'digits'\ntarget = 'host'\n{line}\n", encoding="utf-8")
    code, _, err = run(capsys, "compile", "--config", str(path))
    assert code == 2
    assert said in err


@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--no-check"]])
def test_a_bundle_that_computes_something_else_is_not_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    option: list[str],
) -> None:  # fmt: skip
    right = driver.weights_file

    def wrong(plan: Plan) -> Blob:
        content = bytes(right(plan))
        return Blob((content[:64], bytes(len(content) - 64)))

    monkeypatch.setattr(driver, "weights_file", wrong)
    monkeypatch.chdir(tmp_path)
    network = tmp_path / "m.onnx"
    network.write_bytes(seeds.models()["attention"])
    command = ["compile", str(network), "--target", "host", "-o", "b", "--quiet", *option]
    code, _, said = run(capsys, *command)
    if option:
        assert (code, said) == (0, "")
        assert Bundle.open("b").manifest["source"]["name"] == "m"
        return
    assert code == 1
    assert "does not compute what the model does" in said
    assert "SNR" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_stages_that_count_are_told_as_one() -> None:
    stages = [("reading", 1.0), ("layer 1 of 12", 0.04), ("layer 2 of 12", 0.03), ("link", 0.01)]
    assert _stage_text(stages) == "reading 1.0, layer 1–12 0.1"
