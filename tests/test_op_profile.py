"""Profiles: the figures follow from times and manifest exactly, every runner gives them, and the
kernels of a bundle can be called one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dense
import handmade
import numpy as np
import pytest

from edgepipe import runners
from edgepipe.bundle import Bundle
from edgepipe.cli import main
from edgepipe.errors import UserError
from edgepipe.op_profile import Profile, executed_macs, profile
from edgepipe.runners import local
from edgepipe.target import Target

RAW = {
    "engine": "core", "emulated": False, "rounds": 9, "inference_us": 50.0,
    "steps": [{"us": 40.0, "warm_us": 20.0}],
    "peaks": {"float32": 128e6, "int8": 512e6},
    "copies": [{"bytes": 1024, "bytes_per_s": 8e9}, {"bytes": 4096, "bytes_per_s": 4e9}],
}  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("dense")
    return dense.build(folder, dense.save_model(folder / "dense.onnx", *dense.weights()),
                       *dense.weights())  # fmt: skip


class Fake:
    NAME = "fake"

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def profile(self, bundle: Bundle, runs: int) -> dict[str, Any]:
        return self.raw


def of(raw: dict[str, Any], bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Profile:
    monkeypatch.setattr(runners, "pick", lambda target, name=None: Fake(raw))
    return profile(bundle)


def test_rates_are_work_over_warm_time(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = {**built.manifest["kernels"][0], "weight_bytes": 3000, "activation_bytes": 600}
    shown = replace(built, manifest={**built.manifest, "kernels": [kernel]})
    (op,) = of(RAW, shown, monkeypatch).ops
    assert op.macs == 640 and op.bytes == 3600
    assert op.per_s == pytest.approx(2 * 640 / 20e-6)
    assert op.of_peak == pytest.approx(2 * 640 / 20e-6 / 128e6)
    assert op.of_copy == pytest.approx(3600 / 20e-6 / 4e9)  # 4096 is the nearest block
    result = of(RAW, shown, monkeypatch)
    assert result.ideal_us == pytest.approx(1280 / 128e6 * 1e6)
    assert result.efficiency == pytest.approx(10 / 50)
    text = str(result)
    assert "20 % of the core's peak" in text and "0.050 ms" in text and "dense" in text
    integers = {**kernel, "arithmetic": "int8, weights int4"}
    shown = replace(built, manifest={**built.manifest, "kernels": [integers]})
    assert of(RAW, shown, monkeypatch).ops[0].peak_per_s == 512e6
    json.dumps(result.to_json(), allow_nan=False)


def test_multiplications_that_a_sparse_kernel_leaves_out_do_not_count() -> None:
    kernel = {"macs": 1000, "sparsity": {"zeros": 0.75, "form": "rows"}}
    assert executed_macs(kernel) == 250
    assert executed_macs({**kernel, "sparsity": {"zeros": 0.75, "form": "dense"}}) == 1000
    assert executed_macs({"macs": 1000, "sparsity": None}) == 1000
    assert executed_macs({"macs": 1000, "executed_macs": 444}) == 444
    assert executed_macs({"macs": 1000, "executed_macs": 1200}) == 1000


def test_emulators_and_strange_manifests_are_refused(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="emulates"):
        of({**RAW, "emulated": True}, built, monkeypatch)
    with pytest.raises(UserError, match="other kernels"):
        of({**RAW, "steps": []}, built, monkeypatch)


def test_this_machine(built: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(built.path), "--per-op", "--runs", "3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (op,) = result["ops"]
    assert result["rounds"] == 3 and op["macs"] == 640
    assert op["warm_us"] > 0 and op["of_peak"] > 0
    assert set(result["peaks"]) == {"float32", "int8"} and min(result["peaks"].values()) > 1e6
    assert [size for size, _ in result["copies"]] == [16384 * 4**i for i in range(6)]
    assert main(["bench", str(built.path), "--per-op", "--against", "ort"]) == 2


@pytest.mark.needs_node
def test_node(tmp_path: Path) -> None:
    made = _handmade("wasm-relaxed", tmp_path)
    result = profile(made, runner="node", runs=3)
    assert [op.op for op in result.ops] == ["scale", "relu", "double"]
    assert all(op.warm_us > 0 for op in result.ops) and result.peaks["int8"] > 1e6
    with pytest.raises(UserError, match="no proxy"):
        profile(made, runner="wasmtime")


@pytest.mark.slow
@pytest.mark.needs_browser
def test_a_browser(tmp_path: Path) -> None:
    result = profile(_handmade("wasm-relaxed", tmp_path), runner="browser", runs=3)
    assert len(result.ops) == 3 and result.peaks["float32"] > 1e6
    assert "hrom" in result.engine


@pytest.mark.needs_qemu
def test_boards_programs_profile_too(tmp_path: Path) -> None:
    raw = runners.get("qemu").profile(_handmade("raspberry-pi-5", tmp_path), 2)
    assert raw["emulated"] and len(raw["steps"]) == 3 and raw["peaks"]["int8"] > 0


def _handmade(name: str, folder: Path) -> Bundle:
    target = Target.load(name)
    objects, context = handmade.objects(target, "net"), handmade.context(target)
    return handmade.write(
        folder / name, handmade.source(), handmade.plan("net"), objects, context, "net"
    )


def test_steps_in_order_are_an_inference_however_often_each_is_repeated(tmp_path: Path) -> None:
    import ctypes

    made = _handmade("host", tmp_path)
    library = ctypes.CDLL(str(made.file("model.so")))
    step, count, init = library.net_step, library.net_step_count, library.net_init
    step.argtypes = [ctypes.c_size_t, *[ctypes.c_void_p] * 3]
    init.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

    def aligned(data: np.ndarray) -> np.ndarray:
        raw = np.zeros(data.nbytes + 64, np.uint8)
        view = raw[-raw.ctypes.data % 64 :][: data.nbytes]
        view[:] = data.reshape(-1).view(np.uint8)
        return view

    given = handmade.inputs(3)
    inputs = [aligned(np.atleast_1d(given[t.name])) for t in made.inputs]
    outputs = [aligned(np.zeros(max(1, int(np.prod(t.shape))), t.dtype)) for t in made.outputs]
    arena = aligned(np.full(1 << 16, 255, np.uint8))
    weights = aligned(np.fromfile(made.file("weights.bin"), np.uint8))
    tables = [(ctypes.c_void_p * 2)(*(a.ctypes.data for a in side)) for side in (inputs, outputs)]
    buffers = (*tables, arena.ctypes.data)
    assert count() == 3 and step(0, *buffers) == 4  # not initialised
    assert init(weights.ctypes.data, weights.nbytes) == 0
    for index in range(count()):
        for _ in range(index + 1):
            assert step(index, *buffers) == 0
    wanted = handmade.expected(given)
    for tensor, got in zip(made.outputs, outputs, strict=True):
        value = got.view(tensor.dtype).reshape(tensor.shape)
        np.testing.assert_allclose(value, wanted[tensor.name], rtol=1e-6, atol=1e-6)
    assert local.run_many(made, [given])[0][handmade.NAMES[3]] == wanted[handmade.NAMES[3]]


def test_the_manifest_tells_traffic_and_the_arena(tmp_path: Path) -> None:
    from onnx import helper, numpy_helper, save

    from edgepipe import pipeline

    random = np.random.default_rng(1)
    weights = [(random.standard_normal((16, 16, 1, 1)) / 4).astype(np.float32) for _ in range(3)]
    nodes = [
        helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], name=f"conv{i}")
        for i in range(3)
    ]
    ends = [helper.make_tensor_value_info(n, 1, [1, 16, 8, 8]) for n in ("t0", "t3")]
    initializers = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], initializers)
    opset = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "net.onnx")
    made = pipeline.compile(tmp_path / "net.onnx", target="host", output=tmp_path / "b")
    tensor, weight = 4 * 16 * 64, 4 * (16 * 16 + 16)  # with the bias
    convs = [k for k in made.manifest["kernels"] if k["op_type"].startswith("Conv")]
    assert [(k["activation_bytes"], k["weight_bytes"]) for k in convs] == [(2 * tensor, weight)] * 3
    memory = made.manifest["memory"]
    arena = memory["arena"]
    assert sum(size for _, size, *_ in arena) >= 2 * tensor
    assert max(offset + size for offset, size, *_ in arena) <= memory["arena_bytes"]
    for i, (a, size_a, first_a, last_a) in enumerate(arena):
        for b, size_b, first_b, last_b in arena[i + 1 :]:
            together = first_a <= last_b and first_b <= last_a
            assert not (together and a < b + size_b and b < a + size_a)
    at_once = [
        sum(size for _, size, first, last in arena if first <= step <= last)
        for step in range(len(made.manifest["kernels"]))
    ]
    assert max(at_once) == memory["peak_live_bytes"]
