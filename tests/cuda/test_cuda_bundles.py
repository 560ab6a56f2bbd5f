"""GPU bundles as a whole: compiled, linked for the board, executed by a driver without a GPU."""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cuda import stub
from edgepipe import pipeline
from edgepipe.bundle import Bundle
from edgepipe.cli.compile import gpu_report
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.gpu import VARIABLE
from edgepipe.validation import validate

LOADER = "ld-linux-aarch64.so.1"
pytestmark = [pytest.mark.slow, pytest.mark.needs_cuda_toolkit]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Path]:
    """The trained network that comes along, for a TX2, and a driver that executes it."""
    folder = tmp_path_factory.mktemp("digits")
    bundle = pipeline.compile("digits", target="jetson-tx2", output=folder / "bundle")
    return bundle, stub.executing((bundle.path / "model.cu").read_text("utf-8"), folder)


def ran(digits: tuple[Bundle, Path], patch: pytest.MonkeyPatch, tmp_path: Path, **settings: str):
    """Golden outputs as the bundle computes them, and what it called of the driver."""
    bundle, library = digits
    log = tmp_path / "log"
    patch.setenv(VARIABLE, str(library))
    for name, value in {"LOG": str(log), **settings}.items():
        patch.setenv(f"STUB_{name}", value)
    inputs, _ = bundle.golden()
    return bundle.run(inputs, runner="cuda-local"), log.read_text("utf-8").splitlines()


def test_a_network_computes_what_the_model_does(
    digits: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    got, calls = ran(digits, monkeypatch, tmp_path)
    report = validate(digits[0], runner="cuda-local")
    assert report.ok, report
    assert report.runner == "cuda-local"
    (name,) = got
    swapped = {name: got[name][:, ::-1]}
    assert not np.allclose(swapped[name], digits[0].golden()[1][name], atol=1e-2)
    launches = len([c for c in calls if c.startswith("run ")])
    assert calls.count("launch graph") == 1
    assert f"graph of {launches}" in calls
    weights = digits[0].manifest["memory"]["weights_bytes"]
    assert calls.count(f"upload {weights}") == 1
    assert len([c for c in calls if c.startswith("allocate ")]) == 1


@pytest.mark.parametrize(
    ("settings", "module", "graph"),
    [
        ({}, ["module cubin"], True),
        ({"CAPABILITY": "87", "DRIVER": "12060"}, ["module ptx"], True),
        ({"REFUSES": "cubin"}, ["module cubin", "module ptx"], True),
        ({"REFUSES": "graph"}, ["module cubin"], False),
    ],
)
def test_each_driver_gets_what_it_takes(
    digits: tuple[Bundle, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, str],
    module: list[str],
    graph: bool,
) -> None:
    got, calls = ran(digits, monkeypatch, tmp_path, **settings)
    assert [c for c in calls if c.startswith("module ")] == module
    assert ("launch graph" in calls) is graph
    (name,) = got
    assert np.allclose(got[name], digits[0].golden()[1][name], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"DRIVER": "10010"}, UserError, "CUDA 10.1, too old for PTX 6.5"),
        ({"CAPABILITY": "53"}, UserError, "is sm_53, the kernels need sm_62"),
        ({"DEVICES": "0"}, UserError, "finds no GPU"),
        ({"REFUSES": "cubin,ptx"}, EdgepipeError, "the driver refuses the PTX"),
        ({"REFUSES": "memory"}, EdgepipeError, "CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_what_a_driver_cannot_do_is_one_clear_line(
    digits: tuple[Bundle, Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: dict[str, str],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said) as caught:
        ran(digits, monkeypatch, tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_without_a_driver_that_is_said(
    digits: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "/nowhere/libcuda.so.1")
    with pytest.raises(UserError, match=r"libcuda\.so\.1 cannot be opened: no NVIDIA driver"):
        validate(digits[0], runner="cuda-local")


def test_times_come_with_those_of_the_kernels(
    digits: tuple[Bundle, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(digits[1]))
    timing = digits[0].bench(runner="cuda-local", runs=5).timing
    assert timing is not None
    assert 0 < timing.board["kernels_p50_ms"] <= timing.p50_ms


@pytest.mark.parametrize(
    ("target", "isa", "architecture", "c_library"),
    [
        ("jetson-nano", "6.5", "sm_53", (2, 27)),
        ("jetson-xavier-nx", "7.4", "sm_72", (2, 31)),
        ("jetson-orin-nano", "7.4", "sm_87", (2, 31)),
        ("jetson-thor", "8.4", "sm_90", (2, 39)),
    ],
)
def test_every_generation_gets_its_own_code(
    target: str, isa: str, architecture: str, c_library: tuple[int, int], tmp_path: Path
) -> None:
    bundle = pipeline.compile("digits", target=target, output=tmp_path / "bundle")
    text = bundle.file("model.ptx").read_text("utf-8")
    assert f".version {isa}\n.target {architecture}\n" in text
    assert ("model.cubin" in bundle.manifest["files"]) is (target != "jetson-thor")
    assert not any(k["spill_bytes"] for k in bundle.manifest["gpu"]["kernels"].values())
    assert newest_glibc(bundle.file("bench")) <= c_library


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", ["ic_resnet8", "kws_dscnn"])
def test_trained_networks_equal_their_float_reference(
    name: str, shared_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    bundle = pipeline.compile(shared_models / f"{name}.onnx", target="jetson-tx2", output=path)
    library = stub.executing((path / "model.cu").read_text("utf-8"), tmp_path)
    monkeypatch.setenv(VARIABLE, str(library))
    report = validate(bundle, min_snr_db=100, runner="cuda-local")
    assert report.ok, report


def test_the_host_program_needs_the_boards_c_library_and_no_newer(
    digits: tuple[Bundle, Path],
) -> None:
    for name in ("bench", "model.so"):
        path = digits[0].file(name)
        assert newest_glibc(path) <= (2, 27)
        assert "libc.so.6" in needed(path)
        assert needed(path) <= {"libc.so.6", "libdl.so.2", "libpthread.so.0", LOADER}


def newest_glibc(path: Path) -> tuple[int, ...]:
    """The newest version of the C library that an ELF file asks for symbols of."""
    found = re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())
    return max(tuple(map(int, version)) for version in found)


def needed(path: Path) -> set[str]:
    """The libraries that a 64-bit ELF file is linked to: DT_NEEDED of its dynamic section."""
    data = path.read_bytes()
    headers_at, (size, count) = (
        *struct.unpack_from("<Q", data, 32),
        struct.unpack_from("<HH", data, 54),
    )
    headers = [struct.unpack_from("<IIQQQQQQ", data, headers_at + i * size) for i in range(count)]
    (dynamic,) = (h for h in headers if h[0] == 2)
    entries = list(struct.iter_unpack("<qQ", data[dynamic[2] : dynamic[2] + dynamic[5]]))
    strings = next(value for tag, value in entries if tag == 5)
    at = next(h[2] + strings - h[3] for h in headers if h[0] == 1 and h[3] <= strings < h[3] + h[5])
    names = [at + value for tag, value in entries if tag == 1]
    return {data[name : data.index(0, name)].decode() for name in names}


@pytest.mark.needs_aarch64_libc
def test_the_boards_program_makes_the_calls_in_an_emulator(
    digits: tuple[Bundle, Path], tmp_path: Path
) -> None:
    bundle = digits[0]
    library = stub.recording("aarch64-linux-gnu.2.27", tmp_path)
    log = tmp_path / "log"
    root = "/usr/aarch64-linux-gnu"
    command = ["qemu-aarch64-static", "-cpu", "cortex-a57", "-L", root]
    environment = {VARIABLE: str(library), "STUB_LOG": str(log), "LD_LIBRARY_PATH": f"{root}/lib"}
    words = [w for key, value in environment.items() for w in ("-E", f"{key}={value}")]
    done = subprocess.run(
        [*command, *words, str(bundle.file("bench")), "repeat", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    calls = log.read_text("utf-8").splitlines()
    assert calls.count("launch graph") == 2
    assert "module cubin" in calls
    assert f"upload {bundle.manifest['memory']['weights_bytes']}" in calls


def test_the_manifest_tells_what_ptxas_reports_and_what_is_estimated(
    digits: tuple[Bundle, Path],
) -> None:
    manifest = digits[0].manifest
    gpu = manifest["gpu"]
    assert set(gpu["kernels"]) >= {f"model_{k['kernel']}" for k in manifest["kernels"]}
    assert all(k["registers"] and not k["spill_bytes"] for k in gpu["kernels"].values())
    assert all(0 < k["occupancy"] <= 1 for k in gpu["kernels"].values())
    assert gpu["memory_bytes"] >= sum(
        manifest["memory"][name] for name in ("weights_bytes", "arena_bytes")
    )
    estimate = gpu["estimate"]
    assert estimate["assumptions"].startswith("estimate, not measured: ")
    assert len(estimate["ops"]) == len(manifest["kernels"])
    assert estimate["ms"] == pytest.approx(sum(op["us"] for op in estimate["ops"]) / 1e3, abs=1e-3)
    shown = gpu_report(manifest)
    assert "estimated us" in shown and estimate["assumptions"] in shown


def test_the_same_inputs_give_the_same_bytes(digits: tuple[Bundle, Path], tmp_path: Path) -> None:
    again = pipeline.compile("digits", target="jetson-tx2", output=tmp_path / "again")
    assert again.manifest == digits[0].manifest


def test_the_ptx_is_for_the_boards_driver(digits: tuple[Bundle, Path]) -> None:
    text = digits[0].file("model.ptx").read_text("utf-8")
    assert re.findall(r"(?m)^\.version (\S+)", text) == ["6.5"]
    assert re.findall(r"(?m)^\.target (\S+)", text) == ["sm_62"]
