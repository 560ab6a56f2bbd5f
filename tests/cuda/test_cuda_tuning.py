"""Tuning of GPU kernels without a GPU: settings compute the same, candidates are built, launched by
a driver that executes or records, and measured here or through RPC; records are the sm's own."""

from __future__ import annotations

import dataclasses
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
from rpc_servers import server

from cuda import stub
from cuda.emulation import Emulated
from cuda.test_cuda_pairs import weights_of
from edgepipe import records
from edgepipe.codegen.cuda.device import build_source
from edgepipe.errors import UserError
from edgepipe.gpu import VARIABLE
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp
from edgepipe.kernels.template import select
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target
from edgepipe.tuning import Plan, candidate, meters, search
from edgepipe.tuning.knobs import Kernel

pytestmark = pytest.mark.slow

TX2 = Target.load("jetson-tx2")
X = Blocked(1, 24, 6, 7, 4, (1, 1, 1, 1), "float16")
CONV = ConvOp(X, Blocked(1, 20, 6, 7, 4, dtype="float16"), (3, 3), offset=(1, 1),
              weights=WeightFormat("float16"))  # fmt: skip
OPS = {
    "pair_conv": CONV,
    "pair_depthwise": dataclasses.replace(CONV, y=dataclasses.replace(X), groups=24),
    "conv": dataclasses.replace(
        CONV, x=dataclasses.replace(X, dtype="float32"),
        y=dataclasses.replace(CONV.y, dtype="float32"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPS)
def test_every_setting_computes_the_same_bits(name: str, tmp_path: Path) -> None:
    op, values = OPS[name], np.random.default_rng(2)
    template, _ = select(op, TX2)
    assert template is not None and template.name == name
    default, *others = template.settings(op, TX2)
    assert default == template.default(op, TX2) and len(others) >= 3
    drawn = [default, *random.Random(name).sample(others, 3)]
    kernels = Emulated([op] * len(drawn), TX2, tmp_path, settings=drawn)
    x = values.standard_normal((1, op.x.c, op.x.h, op.x.w)).astype(op.x.dtype)
    weights, _ = weights_of(op, values)
    for given, same in ((weights, True), ([np.roll(weights[0], 1, 0), weights[1]], False)):
        found = [kernels.run(i, [op.x.pack(x)], given, [], op.y.elements, op.y.dtype).tobytes()
                 for i in range(len(drawn))]  # fmt: skip
        assert len(set(found)) == 1
        if same:
            first = found[0]
        else:  # positive control: other weights, other bits
            assert found[0] != first


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A GPU of this machine, sm_62, whose driver takes every call and does nothing."""
    monkeypatch.setenv(VARIABLE, str(stub.recording("x86_64-linux-gnu.2.27", tmp_path)))
    monkeypatch.setenv("STUB_CAPABILITY", "62")
    monkeypatch.setenv("STUB_DRIVER", "10020")
    return Target.load("cuda")


def task(target: Target) -> Kernel:
    template, _ = select(CONV, target)
    return Kernel(template, CONV, 1)


@pytest.mark.needs_cuda_toolkit
def test_a_candidate_launches_both_kernels(
    gpu: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, _ = select(CONV, gpu)
    assert template is not None
    module = candidate.pair(*(template.emit(CONV, k) for k in template.settings(CONV, gpu)[:2]))
    path, log = tmp_path / "candidate", tmp_path / "log"
    path.write_bytes(candidate.build(module, gpu, "PROGRAM"))
    path.chmod(0o755)
    functions = {v.name_hint: f for v, f in module.functions.items()}
    executing = stub.executing(build_source(functions, gpu).source, tmp_path)

    def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv(VARIABLE, str(executing))
        for name, value in {"LOG": str(log), **settings}.items():
            monkeypatch.setenv(f"STUB_{name}", value)
        return subprocess.run([path, *words], capture_output=True, text=True, check=False)

    for which in ("0", "1"):
        log.unlink(missing_ok=True)
        assert run("run", which, "2").returncode == 0
        calls = log.read_text("utf-8").splitlines()
        assert [c for c in calls if c.startswith("run ")] == [f"run candidate_{which}"] * 2
        assert calls[0] == "module cubin"
    done = run("time", "2", "1000")
    assert done.returncode == 0 and len(done.stdout.split()) == 4
    assert run("time", "2", "1000", CAPABILITY="72").returncode == 18
    assert run("time", "2", "1000", CAPABILITY="62", REFUSES="memory").returncode == 20


@pytest.mark.needs_cuda_toolkit
def test_records_are_of_the_sm(gpu: Target, tmp_path: Path) -> None:
    """Through this machine's GPU and through a server, with the same result."""
    for name, runner in (("here", "cuda-local"), ("board", "rpc")):
        file = tmp_path / f"{name}.jsonl"
        if runner == "rpc":
            with server("rpc_server", tmp_path / "server", "--no-fork") as port:
                plan = Plan(2, file, f"rpc:127.0.0.1:{port},timeout=120")
                (record,) = search.tune([task(gpu)], gpu, plan, lambda line: None)
        else:
            plan = Plan(2, file, runner)
            (record,) = search.tune([task(gpu)], gpu, plan, lambda line: None)
        assert (record.features, record.trials, record.unit) == ("sm_62 2", 2, "ns")
        assert record.value > 0
        found = records.read(file)
        assert found.find("pair_conv", CONV, TX2) == record
        assert found.find("pair_conv", CONV, Target.load("jetson-nano")) is None


def test_a_gpu_of_another_sm_is_no_measure(gpu: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUB_CAPABILITY", "87")
    monkeypatch.setenv("STUB_DRIVER", "12060")
    with pytest.raises(UserError, match="is sm_87: it does not tell what is fast on sm_62"):
        meters.meter(TX2, "cuda-local")
