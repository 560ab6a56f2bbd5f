"""Bundles with threads: the bits of one thread, for every number of them, format and device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe import pipeline
from edgepipe.bundle import Bundle
from edgepipe.codegen import flatten
from edgepipe.errors import UserError
from tests.end_to_end.graphs import random_network

COUNTS = (1, 2, 3, 5)


@pytest.fixture
def everything_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are shared however small they are."""
    monkeypatch.setattr(flatten, "LEAST_SHARED_MACS", 0)
    monkeypatch.setattr(flatten, "LEAST_SHARED_BYTES", 0)


def network() -> onnx.ModelProto:
    """Convolutions of all kinds on 13x11 pixels down to 4x3, a residual, a pool, a dense layer."""
    numbers = np.random.default_rng(3)
    nodes, constants = [], []

    def conv(x: str, y: str, co: int, ci: int, k: int, stride: int = 1, groups: int = 1) -> None:
        weight = numbers.standard_normal((co, ci // groups, k, k))
        weight *= np.sqrt(2 / (ci // groups * k * k))
        constants.append(numpy_helper.from_array(weight.astype(np.float32), f"w_{y}"))
        nodes.append(helper.make_node("Conv", [x, f"w_{y}"], [f"c_{y}"], pads=[k // 2] * 4,
                                      strides=[stride] * 2, group=groups))  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"c_{y}"], [y]))

    conv("x", "a", 24, 3, 3, 1)
    conv("a", "b", 24, 24, 3, 2, 24)
    conv("b", "c", 40, 24, 1)
    conv("c", "d", 40, 40, 3)
    nodes.append(helper.make_node("Add", ["c", "d"], ["e"]))
    conv("e", "f", 64, 40, 1, 2)
    nodes.append(helper.make_node("GlobalAveragePool", ["f"], ["g"]))
    nodes.append(helper.make_node("Flatten", ["g"], ["h"]))
    dense = (numbers.standard_normal((64, 10)) / 8).astype(np.float32)
    constants.append(numpy_helper.from_array(dense, "w"))
    nodes.append(helper.make_node("MatMul", ["h", "w"], ["i"]))
    nodes.append(helper.make_node("Softmax", ["i"], ["y"]))
    graph = helper.make_graph(
        nodes, "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 13, 11])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])], constants,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def check(path: Path, folder: Path, target: str, recipe: str = "fp32", most: int = 5) -> Bundle:
    """Compile for one thread and for ``most``; every number of threads gives the same bits."""
    alone = pipeline.compile(path, target=target, recipe=recipe, output=folder / "alone")
    shared = pipeline.compile(
        path, target=target, recipe=recipe, output=folder / "shared", threads=most
    )
    assert alone.threads == 1 and not any(k["pieces"] > 1 for k in alone.manifest["kernels"])
    assert any(k["pieces"] > 1 for k in shared.manifest["kernels"])
    inputs = {
        t.name: np.random.default_rng(5).standard_normal((3, *t.shape[1:]), dtype=np.float32)
        if t.shape[0] == 1 else np.random.default_rng(5).standard_normal(t.shape, np.float32)
        for t in alone.inputs
    }  # fmt: skip
    expected = alone.run(inputs)
    for count in COUNTS:
        got = shared.with_threads(count).run(inputs)
        for name, value in expected.items():
            assert np.isfinite(value).all()
            assert value.tobytes() == got[name].tobytes(), (target, recipe, count, name)
    return shared


@pytest.mark.slow
@pytest.mark.usefixtures("everything_shared")
@pytest.mark.parametrize("recipe", ["fp32", "w8a8", "fp32+80%", "fp32+2:4v32", "w8a8+80%b1x4"])
def test_formats(recipe: str, tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "small.onnx")
    check(tmp_path / "small.onnx", tmp_path, "host", recipe)


@pytest.mark.slow
@pytest.mark.usefixtures("everything_shared")
def test_bench_gives_engines_as_many_threads(tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    onnx.save(network(), path)
    bundle = pipeline.compile(path, target="host", output=tmp_path / "bundle", threads=3)
    for threads, used in ((None, 3), (2, 2)):
        result = bundle.bench(runs=5, against=("ort",), model=path, threads=threads)
        assert result.threads == result.to_json()["threads"] == used
        assert f"{used} threads" in str(result)
        assert result.peers[0].snr_db is not None and result.peers[0].snr_db > 100
    with pytest.raises(UserError, match="up to 3 threads"):
        bundle.with_threads(4)


@pytest.mark.slow
@pytest.mark.needs_qemu
@pytest.mark.usefixtures("everything_shared")
@pytest.mark.parametrize("recipe", ["fp32", "w8a8"])
@pytest.mark.parametrize("target", ["raspberry-pi-4", "raspberry-pi-3-32"])
def test_emulated_boards(target: str, recipe: str, tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "small.onnx")
    check(tmp_path / "small.onnx", tmp_path, target, recipe, most=0)


@pytest.mark.slow
@pytest.mark.usefixtures("everything_shared")
@pytest.mark.parametrize("seed", range(4))
def test_random_networks(seed: int, tmp_path: Path) -> None:
    onnx.save(random_network(seed), tmp_path / "random.onnx")
    check(tmp_path / "random.onnx", tmp_path, "host")


@pytest.mark.slow
@pytest.mark.usefixtures("everything_shared")
def test_threads_that_do_not_compute_all_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positive control: one of three threads starts each kernel a piece too late."""
    from edgepipe.codegen import parts

    cut = parts._cut
    monkeypatch.setattr(
        parts, "_cut", lambda loop, first, low, high: cut(loop, first, low + 1, high)
    )
    onnx.save(network(), tmp_path / "small.onnx")
    with pytest.raises(AssertionError):
        check(tmp_path / "small.onnx", tmp_path, "host")


@pytest.mark.parametrize(
    ("target", "threads", "said"),
    [("wasm-simd", 2, "one thread"), ("jetson-orin-nano", 0, "GPU"), ("host", 17, "16"),
     ("host", -1, "0 to")],
)  # fmt: skip
def test_refused_before_any_work(target: str, threads: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        pipeline.compile("digits", target=target, threads=threads, output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
