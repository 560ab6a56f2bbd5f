"""What keeps a GPU bundle from being made is told in one line, before any work."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cuda import stub
from edgepipe import gpu, peers, pipeline
from edgepipe.codegen.cuda import check_memory, toolkit
from edgepipe.errors import UserError
from edgepipe.target import Target

TX2 = Target.load("jetson-tx2")


def changed(**facts: object) -> Target:
    assert TX2.cuda is not None
    return replace(TX2, cuda=replace(TX2.cuda, **facts))


@pytest.mark.needs_cuda_toolkit
def test_an_architecture_that_nvrtc_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"NVRTC does not know sm_41.*it knows .*62") as caught:
        pipeline.compile("digits", target=changed(sm=41), output=tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_a_missing_wheel_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit._folder.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"cuda_nvrtc is missing; pip install 'edgepipe\[cuda\]'"):
        pipeline.compile("digits", target=TX2, output=tmp_path / "bundle")
    toolkit._folder.cache_clear()


def test_a_network_larger_than_the_board(tmp_path: Path) -> None:
    check_memory(8 * 10**9, TX2)
    with pytest.raises(UserError, match=r"needs 8\.10 GB .* jetson-tx2 has 8 GB in all"):
        check_memory(8_100_000_000, TX2)


@pytest.mark.slow
@pytest.mark.needs_cuda_toolkit
def test_a_network_larger_than_the_board_leaves_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="in all"):
        pipeline.compile("digits", target=changed(memory_gb=1e-6), output=tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_recipes_that_the_board_has_no_arithmetic_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not offer recipe 'w8a8'; it offers fp32, fp16"):
        pipeline.compile("digits", target="jetson-tx2", recipe="w8a8", output=tmp_path / "b")


def test_no_gpu_to_detect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.VARIABLE, "/nowhere/libcuda.so.1")
    with pytest.raises(UserError, match="no NVIDIA driver here; name a board, such as jetson-tx2"):
        Target.load("cuda")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "driver", "sm", "virtual", "isa", "halves", "s8"),
    [
        (62, 10020, 62, 62, "6.5", 2, 0),
        (86, 12040, 86, 86, "8.4", 2, 4),
        (120, 13010, 120, 90, "9.0", 2, 4),
    ],
)  # fmt: skip
def test_the_gpu_of_this_machine_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: int, driver: int, sm: int,
    virtual: int, isa: str, halves: int, s8: int,
) -> None:  # fmt: skip
    monkeypatch.setenv(gpu.VARIABLE, str(stub.recording("x86_64-linux-gnu.2.27", tmp_path)))
    monkeypatch.setenv("STUB_CAPABILITY", str(capability))
    monkeypatch.setenv("STUB_DRIVER", str(driver))
    target = Target.load("cuda")
    assert target.cuda is not None
    assert (target.cuda.sm, target.cuda.virtual_sm, target.cuda.ptx_isa) == (sm, virtual, isa)
    peak = 2 * 128 * 2 * 1.0  # two processors of 128 cores at 1 GHz, two operations
    assert target.cuda.peak_gflops_f32 == peak
    assert (target.cuda.peak_gflops_f16, target.cuda.peak_gops_s8) == (halves * peak, s8 * peak)
    assert target.cuda.bandwidth_gb_s == 32.0  # 128 bits at 1 GHz, both edges
    assert "stub 0" in target.summary
    assert ("w8a8" in target.recipes) is bool(s8)


@pytest.mark.slow
def test_the_comparison_on_a_gpu_says_in_one_line_that_there_is_none() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "latency_gpu.py"
    environment = {**os.environ, gpu.VARIABLE: "/nowhere/libcuda.so.1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("nothing measured: /nowhere/libcuda.so.1 cannot be opened")


@pytest.mark.slow
@pytest.mark.needs_cuda_toolkit
def test_torch_runs_networks_of_the_zoo_that_it_builds(tmp_path: Path) -> None:
    from edgepipe.peers import Case, torch_cuda

    bundle = pipeline.compile("digits", target=TX2, output=tmp_path / "bundle")
    with pytest.raises(UserError, match="'digits' is no network of the zoo that torch builds"):
        torch_cuda.engines(Case(bundle))
    with pytest.raises(UserError, match="torch-cuda runs as 'cuda-local' does"):
        peers.engines(Case(bundle), "torch-cuda", "local")
