"""The search: what is drawn, what is believed, what goes on after an interruption."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgepipe import records
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp
from edgepipe.kernels.template import select
from edgepipe.lowering.emit import plain
from edgepipe.target import Target
from edgepipe.tuning import Plan, meters, search
from edgepipe.tuning.knobs import Kernel, draw
from edgepipe.tuning.search import Session, compare

HOST = Target.load("host")
LANES = HOST.simd.lanes_f32
OP = ConvOp(Blocked(1, 32, 9, 9, LANES), Blocked(1, 32, 9, 9, LANES), (1, 1))
SPACE = [{"a": a, "b": b} for a in range(8) for b in (True, False)]


def task(op: ConvOp = OP) -> Kernel:
    template, _ = select(op, HOST)
    return Kernel(template, op, 1)


class FakeMeter:
    """Says what a function of the knobs says, time after time."""

    unit, measured_on, boards, form = "ns", "nowhere", 1, "PROGRAM"

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    def close(self) -> None:
        pass


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tuning in which nothing is built: ratios come from a function of (knobs, how often asked).

    Returns (a function that installs it, the settings that were asked for)."""
    asked: list[dict[str, Any]] = []

    def install(answer: Any) -> list[dict[str, Any]]:
        def measured(self: Session, task: Kernel, settings: Any) -> Any:
            found: list[tuple[float, float] | None] = []
            for knobs in settings:
                asked.append(knobs)
                ratio = answer(knobs, sum(k == knobs for k in asked))
                found.append(None if ratio is None else (ratio, 100 * ratio))
            return found

        monkeypatch.setattr(Session, "_measured", measured)
        monkeypatch.setattr(meters, "meter", lambda target, runner: FakeMeter(answer))
        asked.clear()
        return asked

    return install


def test_a_seed_draws_the_same_and_another_one_something_else() -> None:
    one = draw(SPACE, SPACE[4], 6, "1")
    assert one == draw(SPACE, SPACE[4], 6, "1")
    assert one != draw(SPACE, SPACE[4], 6, "2")
    assert SPACE[4] not in one
    assert len({repr(k) for k in one}) == 6
    assert {"a": 2, "b": False} in one  # it differs in b alone
    assert len(draw(SPACE, SPACE[4], 100, "1")) == len(SPACE) - 1


def test_the_same_search_twice(tmp_path: Path, faked: Any) -> None:
    runs = []
    for name in ("a", "b"):
        asked = faked(lambda knobs, times: 1.0 - knobs["pixels"] / 1000)
        found = search.tune([task()], HOST, Plan(7, tmp_path / name), lambda line: None)
        runs.append((list(asked), found))
    assert runs[0] == runs[1]
    asked = faked(lambda knobs, times: 1.0)
    search.tune([task()], HOST, Plan(7, tmp_path / "c", seed=1), lambda line: None)
    assert asked != runs[0][0]


def test_the_best_one_is_recorded(tmp_path: Path, faked: Any) -> None:
    faked(lambda knobs, times: 0.5 + knobs["pixels"] / 100)
    (record,) = search.tune([task()], HOST, Plan(8, tmp_path / "r"), lambda line: None)
    own = task()
    default = own.template.default(OP, HOST)
    seed = f"0 conv {records.op_key(OP)}"
    least = min(k["pixels"] for k in draw(own.template.settings(OP, HOST), default, 8, seed))
    assert record.knobs["pixels"] == least
    assert record.ratio == pytest.approx(0.5 + least / 100)
    assert record.trials == 8
    assert records.read(tmp_path / "r").find("conv", OP, HOST) == record


@pytest.mark.parametrize("answer", [
    lambda knobs, times: 0.99,  # too little
    lambda knobs, times: 0.7 if times == 1 else 1.01,  # once, and never again
    lambda knobs, times: 0.7 if times < 3 else 0.985,
    lambda knobs, times: None,  # nothing can be measured
    lambda knobs, times: 0.7 if times == 1 else None,  # nor measured again
], ids=["little", "once", "mostly", "never", "crashes"])  # fmt: skip
def test_what_is_not_clearly_faster_is_not_believed(
    tmp_path: Path, faked: Any, answer: Any
) -> None:
    faked(answer)
    (record,) = search.tune([task()], HOST, Plan(8, tmp_path / "r"), lambda line: None)
    own = task()
    assert record.knobs == plain(own.template.default(OP, HOST))
    assert record.ratio == 1


def test_an_interrupted_tuning_goes_on(tmp_path: Path, faked: Any) -> None:
    other = dataclasses.replace(OP, y=Blocked(1, 64, 9, 9, LANES))
    tasks, plan = [task(), task(other)], Plan(4, tmp_path / "r")
    first = faked(lambda knobs, times: 0.9)
    search.tune(tasks[:1], HOST, plan, lambda line: None)
    assert first
    second = faked(lambda knobs, times: 0.9)
    found = search.tune(tasks, HOST, plan, lambda line: None)
    assert len(found) == 2
    space = task(other).template.settings(other, HOST)
    assert second
    assert all(knobs in space for knobs in second)
    third = faked(lambda knobs, times: 0.9)
    assert search.tune(tasks, HOST, plan, lambda line: None) == found
    assert not third  # all is known
    more = faked(lambda knobs, times: 0.9)
    search.tune(tasks, HOST, Plan(6, tmp_path / "r"), lambda line: None)
    assert more  # more trials were asked for


def test_a_ratio_is_the_worse_of_both_views() -> None:
    assert compare([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == (0.5, 1.0)
    assert compare([2.0, 2.0, 1.0], [1.0, 1.0, 1.0])[0] == 1.0  # the default was fast once
    assert compare([1.0, 1.0, 2.0], [1.0, 1.0, 0.5])[0] == 1.0  # so was the candidate
