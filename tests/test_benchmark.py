"""Benchmarking: both engines are measured, conditions are told, emulation is never a latency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense
import numpy as np
import pytest
from onnx import helper, numpy_helper, save

from edgepipe import peers, pipeline, runners
from edgepipe.benchmark import Benchmark, Latency, bench
from edgepipe.bundle import Bundle
from edgepipe.errors import UserError
from edgepipe.recipe import Recipe, Settings


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


@pytest.mark.slow
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


def test_an_engine_that_computes_something_else_is_named(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    (right,) = peers.engines(peers.Case(built), "ort", "local")
    wrong = peers.Engine("other", right.measure, lambda: {"scores": -right.outputs()["scores"]})
    monkeypatch.setattr(peers, "engines", lambda case, name, runner: [right, wrong])
    result = bench(built, runs=5, against=("ort",))
    assert result.peers[0].snr_db is not None and result.peers[0].snr_db > 100
    assert "other: its outputs are" in str(result)
    assert str(result).count("another model?") == 1
    shape = peers.Engine("other", right.measure, lambda: {"scores": np.zeros((1, 3))})
    monkeypatch.setattr(peers, "engines", lambda case, name, runner: [shape])
    with pytest.raises(UserError, match="gives"):
        bench(built, runs=5, against=("ort",))


def test_peers_say_what_they_lack(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepipe.peers import openvino

    monkeypatch.setattr(openvino, "missing", lambda: "pip install it")
    with pytest.raises(UserError, match="pip install it"):
        bench(built, runs=5, against=("openvino",))
    with pytest.raises(UserError, match="no such file"):
        bench(built, runs=5, against=("ort=gone.onnx",))
    missing: list[str] = []
    result = bench(built, runs=5, against=("openvino", "ort"), missing=missing)
    assert [p.engine.split()[0] for p in result.peers] == ["ONNX"]
    assert missing == ["--against: openvino is not installed; pip install it"]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A convolution with a channels-first input, in integers, with the files for other engines."""
    folder = tmp_path_factory.mktemp("quantized")
    random = np.random.default_rng(2)
    w, v = (
        (random.standard_normal(s) / 5).astype(np.float32) for s in ((8, 3, 3, 3), (8, 8, 1, 1))
    )
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["t"], pads=[1, 1, 1, 1], name="first"),
         helper.make_node("Relu", ["t"], ["r"], name="relu"),
         helper.make_node("Conv", ["r", "v"], ["y"], name="second")], "net",
        [helper.make_tensor_value_info("x", 1, [1, 3, 8, 6])],
        [helper.make_tensor_value_info("y", 1, [1, 8, 8, 6])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / "net.onnx")
    # The golden inputs fill the whole range of the codes; channels of like ranges would all be cut.
    recipe = Recipe("w8a8", Settings(methods=("reconstruction",)))
    return pipeline.compile(folder / "net.onnx", target="host", recipe=recipe,
                            emit=("onnx", "tflite"), output=folder / "b")  # fmt: skip


def test_both_forms_of_a_quantized_model(quantized: Bundle) -> None:
    float_model, integers = bench(quantized, runs=5, against=("ort",)).peers
    assert integers.engine.endswith(", Q/DQ")
    assert integers.snr_db and float_model.snr_db and integers.snr_db > float_model.snr_db > 20


@pytest.mark.needs_litert
def test_litert(quantized: Bundle, built: Bundle, tmp_path: Path) -> None:
    (peer,) = bench(quantized, runs=5, against=("litert",)).peers
    assert peer.median_ms > 0 and peer.snr_db is not None and peer.snr_db > 12  # wrong axes: 0
    with pytest.raises(UserError, match="--emit tflite"):
        bench(built, runs=5, against=("litert",))
    other = tmp_path / "other.tflite"
    other.write_bytes(quantized.file("model.tflite").read_bytes())
    with pytest.raises(UserError, match=r"takes float32 \[1, 8, 6, 3\]"):
        bench(built, runs=5, against=(f"litert={other}",))
    other.write_bytes(b"not a model at all")
    with pytest.raises(UserError, match="LiteRT refuses the file"):
        bench(built, runs=5, against=(f"litert={other}",))


@pytest.mark.needs_openvino
def test_openvino(quantized: Bundle) -> None:
    result = bench(quantized, runs=5, against=("openvino", "ort"))
    assert [p.engine.split()[0] for p in result.peers] == ["OpenVINO"] * 2 + ["ONNX"] * 2
    assert all(p.snr_db is not None and p.snr_db > 20 for p in result.peers)


@pytest.mark.needs_ncnn
def test_ncnn(quantized: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (peer,) = bench(quantized, runs=5, against=("ncnn",)).peers
    assert peer.engine.startswith("ncnn ") and peer.median_ms > 0
    assert peer.snr_db is not None and peer.snr_db > 20  # it computes in float32, the bundle not
    assert not list(tmp_path.iterdir())  # pnnx writes seven files where it runs


@pytest.mark.slow
@pytest.mark.needs_ncnn
def test_ncnn_computes_the_original_and_says_what_it_cannot(tmp_path: Path) -> None:
    built = _of_one_size(tmp_path, [helper.make_node("Relu", ["x"], ["y"])], "relu", n=1)
    (engine,) = peers.engines(peers.Case(built, threads=2), "ncnn", "local")
    (x,), (y,) = (part.values() for part in built.golden())
    assert np.array_equal(engine.outputs()["y"].reshape(y.shape), np.maximum(x, 0))
    pool = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    two = _of_one_size(tmp_path, [pool], "two", n=2)
    with pytest.raises(UserError, match="one sample at a time, the model 2"):
        bench(two, runs=5, against=("ncnn",))
    nodes = [helper.make_node("Hardmax", ["x"], ["y"])]
    with pytest.raises(UserError, match="ncnn has no layer for Hardmax"):
        bench(_of_one_size(tmp_path, nodes, "hardmax", n=1), runs=5, against=("ncnn",))


def _of_one_size(folder: Path, nodes: list[Any], name: str, n: int) -> Bundle:
    """Nodes from "x" to "y", images of 3 channels."""
    ends = [helper.make_tensor_value_info(e, 1, [n, 3, 4, 5]) for e in "xy"]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), folder / f"{name}.onnx")
    return pipeline.compile(folder / f"{name}.onnx", target="host", output=folder / name)
