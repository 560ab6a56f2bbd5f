"""The script that measures on a GPU, run through a driver that executes kernels on the CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from cuda import stub
from edgepipe import pipeline
from edgepipe.gpu import VARIABLE
from edgepipe.peers import Case, Engine, torch_cuda

pytestmark = [pytest.mark.slow, pytest.mark.needs_cuda_toolkit]


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[str], str]], ModuleType]:
    """``latency_gpu.py`` on a GPU that executes bundles of ``digits``, their source edited."""
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))

    def loaded(edit: Callable[[str], str]) -> ModuleType:
        bundle = pipeline.compile("digits", target="jetson-tx2", output=tmp_path / "same")
        source = edit((bundle.path / "model.cu").read_text("utf-8"))
        monkeypatch.setenv(VARIABLE, str(stub.executing(source, tmp_path)))
        monkeypatch.setenv("STUB_CAPABILITY", "87")
        monkeypatch.setenv("STUB_DRIVER", "12060")
        spec = util.spec_from_file_location("latency_gpu", folder / "latency_gpu.py")
        assert spec is not None and spec.loader is not None
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    words = ["--models", "digits", "--targets", "jetson-tx2", "--recipes", "fp32", "--runs", "5"]
    json_file = ["--json", str(tmp_path / "results.json")]
    monkeypatch.setattr(sys, "argv", ["latency_gpu.py", *words, *json_file])
    return loaded


def test_bundles_are_checked_and_measured_in_turn_with_torch(
    script: Callable[[Callable[[str], str]], ModuleType],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    def engines(case: Case) -> list[Engine]:
        """What takes the place of torch: the golden outputs, in no time."""
        return [Engine("torch's place", lambda runs, warmup: (1.0, 1.0),
                       lambda: case.bundle.golden()[1])]  # fmt: skip

    monkeypatch.setattr(torch_cuda, "missing", lambda: "")
    monkeypatch.setattr(torch_cuda, "engines", engines)
    module = script(str)
    assert module.main() == 0
    (result,) = json.loads((tmp_path / "results.json").read_text("utf-8"))["results"]
    assert result["snr_db"] >= 100 and result["right"]
    assert result["ratio"] == result["edgepipe_ms"] > 0
    assert 0 < result["kernels_ms"] <= 2 * result["edgepipe_ms"]
    assert result["engine"] == "torch's place" and result["agreement_db"] >= 100
    assert not module.fine({**result, "recipe": "fp16", "ratio": 0.91})


def test_wrong_kernels_fail_and_a_missing_torch_is_said(
    script: Callable[[Callable[[str], str]], ModuleType],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(torch_cuda, "missing", lambda: "pip install a torch")
    module = script(lambda source: source.replace(" max(", " min("))
    assert module.main() == 1
    assert "not compared with PyTorch: pip install a torch" in capsys.readouterr().out
