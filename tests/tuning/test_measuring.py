"""Candidates are really measured: here, in V8, counted under QEMU, on boards behind a tracker."""

from __future__ import annotations

import dataclasses
import shutil
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from rpc_servers import server
from tvm.s_tir.meta_schedule.runner import RunnerInput

from edgepipe import pipeline, records
from edgepipe.codegen import driver, link
from edgepipe.errors import EdgepipeError, UserError
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp
from edgepipe.kernels.template import select
from edgepipe.runners import rpc
from edgepipe.runners._base import Address
from edgepipe.target import Target
from edgepipe.tuning import Plan, boards, candidate, meters, search
from edgepipe.tuning.knobs import Kernel

SIZES = [("float32", 64)]
#: Kernels in C: what every way of measuring is given instead of a template's.
KERNELS = """
void candidate_0(volatile float *x) { for (int i = 0; i < 2000; i++) *x = *x + 1; }
void candidate_1(volatile float *x) { %s }
"""
BODIES = {
    "longer": "for (int i = 0; i < 20000; i++) *x = *x + 1;",
    "crash": "__builtin_trap();",
    "hang": "for (;;) *x = *x + 1;",
}


def built(target: Target, form: str, folder: Path) -> dict[str, RunnerInput]:
    """A pair for each of BODIES."""
    source = driver.candidate_source(dict.fromkeys(candidate.SYMBOLS, SIZES))
    triple = target.link.static_zig_target or target.link.zig_target
    found = {}
    for name, body in BODIES.items():
        (folder / "k.c").write_text(KERNELS % body)
        link.zig("cc", "-target", triple, "-O1", "-fPIC", "-fno-sanitize=all", "-c", "k.c",
                 "-o", "k.o", cwd=folder)  # fmt: skip
        code = link.candidate(target, source, (folder / "k.o").read_bytes(), form)
        path = folder / f"{name}{'.so' * (form == 'LIBRARY')}"
        path.write_bytes(code)
        path.chmod(0o755)
        found[name] = RunnerInput(str(path), "cpu", [])
    return found


def check(meter: Any, given: dict[str, RunnerInput]) -> None:
    """A ratio of ten is seen, before and after a candidate that crashes and one that hangs."""
    try:
        order = ["longer", "crash", "longer", "hang", "longer"]
        results = [future.result() for future in meter.run([given[name] for name in order])]
        for name, result in zip(order, results, strict=True):
            if name == "longer":
                values = [float(v) for v in result.run_secs]
                assert search.compare(values[::2], values[1::2])[0] > 2
            else:
                assert result.error_msg, name
    finally:
        meter.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "TIMEOUT_S", 15.0)


@pytest.mark.slow
def test_here(tmp_path: Path, impatient: None) -> None:
    host = Target.load("host")
    check(meters.meter(host, None), built(host, "PROGRAM", tmp_path))


@pytest.mark.slow
@pytest.mark.needs_node
def test_in_v8(tmp_path: Path, impatient: None) -> None:
    wasm = Target.load("wasm-simd")
    check(meters.meter(wasm, None), built(wasm, "MODULE", tmp_path))


@pytest.mark.slow
@pytest.mark.needs_qemu_plugins
def test_counted(tmp_path: Path, impatient: None) -> None:
    board = Target.load("raspberry-pi-4")
    meter = meters.meter(board, "qemu")
    assert meter.unit == "instructions"
    given = built(board, "PROGRAM", tmp_path)
    counts = [meter.measure(given["longer"].artifact_path) for _ in range(2)]
    assert counts[0] == counts[1]  # whatever else the machine does
    assert all(value % 1 == 0 for value in counts[0])
    assert counts[0][0] >= 2000 * 4  # load, add, store, branch
    assert 9.9 < counts[0][1] / counts[0][0] < 10.1
    check(meter, given)


def test_a_qemu_without_plugins_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/true" if "qemu" in name else None)
    with pytest.raises(UserError, match="with plugins is not installed"):
        meters.meter(Target.load("raspberry-pi-4"), "qemu")


def test_ways_that_cannot_measure_kernels_are_told() -> None:
    with pytest.raises(UserError, match=r"cannot (measure|run)"):
        meters.meter(Target.load("wasm-simd"), "wasmtime")
    with pytest.raises(UserError, match="no server was named"):
        meters.meter(Target.load("jetson-tx2"), "rpc")


def registered(name: str, boards: int) -> None:
    """Wait until the tracker of ``name`` has ``boards`` of its key; a minute at most."""
    server = rpc.at(Address.parse(name)[1])
    deadline = time.monotonic() + 60
    found = 0
    while found < boards and time.monotonic() < deadline:
        time.sleep(0.1)
        with suppress(UserError):  # none yet
            found = server.count()
    assert found == boards


@pytest.mark.slow
def test_several_boards_behind_a_tracker(tmp_path: Path) -> None:
    """Two boards take candidates at once; what is found is what one finds."""
    host = Target.load("host")
    used: list[int] = []
    with ExitStack() as stack:
        tracker = stack.enter_context(server("rpc_tracker", tmp_path / "tracker"))
        options = ("--no-fork", f"--tracker=127.0.0.1:{tracker}", "--key=desk")
        for number in range(2):
            stack.enter_context(server("rpc_server", tmp_path / f"server{number}", *options))
        name = f"rpc:127.0.0.1:{tracker},key=desk,timeout=120"
        registered(name, 2)  # a server listens before the tracker has heard of it
        meter = meters.meter(host, name)
        assert meter.boards == 2
        folder = tmp_path / "pairs"
        folder.mkdir()
        given = built(host, "LIBRARY", folder)["longer"]
        for number in range(4):  # files of one name must not meet on a board
            shutil.copy(given.artifact_path, folder / f"pair{number}.so")
            used.append(number)
        inputs = [RunnerInput(str(folder / f"pair{n}.so"), "cpu", []) for n in used]
        for future in meter.run(inputs):
            values = [float(v) for v in future.result().run_secs]
            assert len(values) == 2 * boards.ROUNDS
            assert search.compare(values[::2], values[1::2])[0] > 2
        meter.close()
        op = ConvOp(Blocked(1, 8, 9, 9, 8), Blocked(1, 16, 9, 9, 8), (1, 1))
        template, _ = select(op, host)
        plan = Plan(2, tmp_path / "r.jsonl", name)
        (record,) = search.tune([Kernel(template, op, 1)], host, plan, lambda line: None)
        assert record.measured_on == f"rpc:127.0.0.1:{tracker}"
        with pytest.raises(UserError, match="no board 'shelf'"):
            meters.meter(host, f"rpc:127.0.0.1:{tracker},key=shelf")


def test_a_board_that_is_not_there_is_told(tmp_path: Path) -> None:
    meter = boards.Boards(rpc.at(Address.parse("rpc:127.0.0.1:9,retries=0")[1]))
    path = tmp_path / "pair.so"
    path.write_bytes(b"")
    with pytest.raises((UserError, EdgepipeError), match="cannot be reached"):
        meter.measure(str(path))
    meter.close()


@pytest.mark.slow
def test_a_tuned_bundle_computes_the_same(tmp_path: Path) -> None:
    """Tuned for this machine, a network gives the same bits, with the records named."""
    file = tmp_path / "r.jsonl"
    host = Target.load("host")
    found = pipeline.tune("digits", target=host, tuning=Plan(2, file))
    tasks = _tasks(host)  # operators of one setting alone are none
    assert len(found) == len(tasks) > 4
    # Every operator gets another setting, faster or not: what is tested is that it is taken.
    for record, task in zip(found, tasks, strict=True):
        space = task.template.settings(task.op, host)
        other = next(k for k in reversed(space) if k != task.template.default(task.op, host))
        records.append(file, dataclasses.replace(record, knobs=other, ratio=0.5))
    from edgepipe import golden, runners

    results = []
    for name, given in (("tuned", str(file)), ("default", "none")):
        bundle = pipeline.compile("digits", target=host, output=tmp_path / name, records=given)
        own = [kernel["tuned"] for kernel in bundle.manifest["kernels"]]
        assert own.count("r.jsonl") == (len(tasks) if name == "tuned" else 0), own
        sample = golden.synthetic_inputs(bundle.inputs)
        results.append(runners.run(bundle, sample)["logits"])
    assert results[0].tobytes() == results[1].tobytes()


def _tasks(target: Target) -> list[Kernel]:
    from edgepipe import importer, lowering, passes, tuning
    from edgepipe.context import Context
    from edgepipe.recipe import Recipe

    context = Context(target, Recipe.parse("fp32"))
    graph = passes.run(importer.load("digits", None).model, context)
    lowering.describe_kernels(graph, context)
    return tuning.tasks(graph.graph, context)
