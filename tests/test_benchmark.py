"""Benchmarking: both engines are measured, conditions are told, emulation is never a latency."""

from __future__ import annotations

from pathlib import Path

import dense
import pytest

from edgepipe import runners
from edgepipe.benchmark import Benchmark, Latency, bench
from edgepipe.bundle import Bundle
from edgepipe.errors import UserError


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("dense")
    model = dense.save_model(folder / "dense.onnx", *dense.weights())
    return dense.build(folder, model, *dense.weights())


def test_ours_and_onnx_runtime_in_one_run(built: Bundle) -> None:
    result = bench(built, runs=20)
    assert result.runs == 20
    assert result.rounds == 5
    (peer,) = result.peers
    assert "ONNX Runtime" in peer.engine
    assert 0 < result.ours.min_ms <= result.ours.low_ms <= result.ours.median_ms
    assert result.ratios[peer.engine] == result.ours.median_ms / peer.median_ms
    text = str(result)
    assert text.splitlines()[0].startswith(f"{result.ratios[peer.engine]:.2f} × ONNX Runtime")
    assert result.machine["cpu"] in text
    assert result.versions["onnxruntime"] in text
    assert result.to_json()["ratios"]


def test_without_the_original_only_the_bundle_is_measured(built: Bundle, tmp_path: Path) -> None:
    model = dense.save_model(tmp_path / "gone.onnx", *dense.weights())
    alone = dense.build(tmp_path, model, *dense.weights())
    model.unlink()
    assert bench(alone, runs=3).peers == ()
    with pytest.raises(UserError, match="--model"):
        bench(alone, runs=3, against=("ort",))


def test_no_peer_on_request(built: Bundle) -> None:
    assert bench(built, runs=3, against=("none",)).peers == ()


def test_unknown_peers_are_refused(built: Bundle) -> None:
    with pytest.raises(UserError, match="did you mean 'ort'"):
        bench(built, runs=3, against=("otr",))


def test_emulated_times_are_never_compared(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    local = runners.get("local")

    class Emulator:
        NAME = "qemu"
        bench = staticmethod(
            lambda *a: runners.Timing("qemu", "qemu-aarch64", True, 1, 1, 1, 1, 1, 1, 1)
        )

    monkeypatch.setattr(runners, "pick", lambda target, name=None: Emulator)
    result = bench(built, runs=5)
    assert result.peers == ()
    assert result.ratios == {}
    assert "say nothing of the device" in str(result)
    with pytest.raises(UserError, match="cannot be compared"):
        bench(built, runs=5, against=("ort",))
    assert local.NAME == "local"


def test_the_ratio_is_ours_over_theirs() -> None:
    ours = Latency.of("ours", [3.0, 2.0, 4.0], [1.0])
    peer = Latency.of("peer", [6.0, 6.0, 9.0], [5.0])
    result = Benchmark("b", "local", ours, (peer,), 3, 3, {}, {})
    assert ours.median_ms == 3.0
    assert result.ratios == {"peer": 0.5}
    assert "faster" in str(result)
