"""Measures settings of operators and keeps what beats the default rule clearly."""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm.s_tir.meta_schedule.builder import BuilderInput
from tvm.s_tir.meta_schedule.runner import RunnerInput

from edgepipe import records
from edgepipe.kernels.template import Knobs
from edgepipe.lowering.emit import plain
from edgepipe.records import Record
from edgepipe.target import Target
from edgepipe.tuning import Plan, Task, meters
from edgepipe.tuning.candidate import Builder, pair

#: A setting has to save this share, every time it is measured.
LEAST_GAIN = 0.02
#: Settings that are measured again, and how often.
FINALISTS, AGAIN = 3, 2
#: Candidates built before they are measured, for each board.
_BATCH = 4


def tune(
    tasks: Sequence[Task], target: Target, plan: Plan, progress: Callable[[str], None]
) -> list[Record]:
    """Records of all ``tasks``: those in the file already, where they saw as many trials, and new
    ones, each appended as soon as it is known. Raises UserError."""
    known = records.read(plan.file) if plan.file.exists() else records.NO_RECORDS
    with _session(target, plan) as session:
        results = []
        for number, task in enumerate(tasks, 1):
            record = known.find(task.template.name, task.op, target)
            if record is None or not _serves(record, task, plan, session):
                what = f"{task.template.name} {number} of {len(tasks)}"
                record = session.tune(task, what, progress)
                records.append(plan.file, record)
            results.append(record)
        return results


def _serves(record: Record, task: Task, plan: Plan, session: Session) -> bool:
    same = record.version == task.template.version and record.unit == session.meter.unit
    space = task.template.settings(task.op, session.target)
    return same and record.trials >= min(plan.trials, len(space))


def draw(space: Sequence[Knobs], default: Knobs, trials: int, seed: str) -> list[Knobs]:
    """``trials`` settings without the default: the nearest to it for a half, the rest at random.

    The same ``seed`` draws the same.
    """
    others = [knobs for knobs in space if plain(knobs) != plain(default)]
    generator = random.Random(seed)
    generator.shuffle(others)
    others.sort(key=lambda knobs: _distance(knobs, default))
    near = others[: (trials + 1) // 2]
    rest = others[len(near) :]
    return near + generator.sample(rest, min(trials - len(near), len(rest)))


def _distance(one: Knobs, other: Knobs) -> float:
    """Relative differences of numbers; a quarter for anything else that differs."""
    total = 0.0
    for name, value in one.items():
        base = other[name]
        if type(value) is int and type(base) is int:
            total += abs(value - base) / max(value, base, 1)
        else:
            total += 0.25 * (value != base)
    return total


@contextlib.contextmanager
def _session(target: Target, plan: Plan) -> Iterator[Session]:
    meter = meters.meter(target, plan.runner)
    try:
        with tempfile.TemporaryDirectory(prefix="edgepipe-tune-") as folder:
            yield Session(target, plan, meter, Builder(target, meter.form, Path(folder)))
    finally:
        meter.close()


@dataclass
class Session:
    """What measures all operators of one tuning."""

    target: Target
    plan: Plan
    meter: Any
    builder: Any

    def tune(self, task: Task, what: str, progress: Callable[[str], None]) -> Record:
        """The record of one operator; its default knobs where nothing is clearly faster."""
        template, op = task.template, task.op
        default, space = template.default(op, self.target), template.settings(op, self.target)
        seed = f"{self.plan.seed} {template.name} {records.op_key(op)}"
        drawn = draw(space, default, self.plan.trials, seed)
        progress(f"measuring {what}: {len(drawn)} of {len(space)} settings")
        seen: list[tuple[float, float, Knobs]] = []
        size = _BATCH * self.meter.boards
        for start in range(0, len(drawn), size):
            seen += self._measured(task, default, drawn[start : start + size])
        seen.sort(key=lambda entry: entry[0])
        ratio, value, knobs = self._confirmed(task, default, seen[:FINALISTS])
        value = value or min((v / r for r, v, _ in seen), default=0.0)
        return Record(
            template=template.name, version=template.version, op=records.op_key(op),
            features=records.features(self.target), knobs=plain(knobs), ratio=round(ratio, 4),
            value=float(f"{value:.6g}"), unit=self.meter.unit,
            measured_on=self.meter.measured_on, trials=len(drawn), seed=self.plan.seed,
        )  # fmt: skip

    def _confirmed(
        self, task: Task, default: Knobs, best: Sequence[tuple[float, float, Knobs]]
    ) -> tuple[float, float, Knobs]:
        """The best that gains every time it is measured, by its worst; ratio 1 for the default."""
        found = (1.0, 0.0, default)
        for ratio, value, knobs in best:
            worst = ratio
            if worst > 1 - LEAST_GAIN:
                break
            again = 0 if self.meter.unit == "instructions" else AGAIN
            repeated = self._measured(task, default, [knobs] * again)
            if len(repeated) < again:
                continue
            worst = max([ratio, *(r for r, _, _ in repeated)])
            if worst <= 1 - LEAST_GAIN and worst < found[0]:
                found = worst, min([value, *(v for _, v, _ in repeated)]), knobs
        return found

    def _measured(
        self, task: Task, default: Knobs, settings: Sequence[Knobs]
    ) -> list[tuple[float, float, Knobs]]:
        """Ratio to the default, value and knobs of each setting that could be measured."""
        modules = [pair(task.template, task.op, default, knobs) for knobs in settings]
        # MetaSchedule's interface wants a target; the builder knows the real one.
        llvm = tvm.target.Target({"kind": "llvm"})
        built = self.builder.build([BuilderInput(module, llvm) for module in modules])
        there = [
            (knobs, str(result.artifact_path))
            for knobs, result in zip(settings, built, strict=True)
            if result.error_msg is None
        ]
        futures = self.meter.run([RunnerInput(path, "cpu", []) for _, path in there])
        measured = []
        for (knobs, path), future in zip(there, futures, strict=True):
            result = future.result()
            Path(path).unlink(missing_ok=True)
            if result.error_msg is None:
                values = [float(v) for v in result.run_secs]
                ratio, value = compare(values[::2], values[1::2])
                measured.append((ratio, value * self.scale, knobs))
        return measured

    @property
    def scale(self) -> float:
        """From what a runner tells to the unit of records."""
        return 1.0 if self.meter.unit == "instructions" else 1e9


def compare(default: Sequence[float], own: Sequence[float]) -> tuple[float, float]:
    """Ratio to the default and the least value. The ratio is the larger of that of minima and the
    median of the rounds' own: either alone is misled by what else the machine does."""
    median = statistics.median(b / a for a, b in zip(default, own, strict=True))
    return max(median, min(own) / min(default)), min(own)
