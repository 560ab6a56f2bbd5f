"""Measures settings of operators and keeps what beats the default rule clearly."""

from __future__ import annotations

import contextlib
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
from edgepipe.records import Record
from edgepipe.target import Target
from edgepipe.tuning import Plan, Task, meters
from edgepipe.tuning.candidate import Builder

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
            record = known.find(task.name, task.key, target)
            if record is None or not _serves(record, task, plan, session):
                what = f"{task.name} {number} of {len(tasks)}"
                record = session.tune(task, what, progress)
                records.append(plan.file, record)
            results.append(record)
        return results


def _serves(record: Record, task: Task, plan: Plan, session: Session) -> bool:
    same = record.version == task.version and record.unit == session.meter.unit
    size = task.size(session.target)
    return same and record.trials >= (plan.trials if size is None else min(plan.trials, size - 1))


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
        """The record of one operator; its default where nothing is clearly faster."""
        plan, size = self.plan, task.size(self.target)
        count = plan.trials if size is None else min(plan.trials, size - 1)
        progress(
            f"measuring {what}: {count} {'schedules' if size is None else f'of {size} settings'}"
        )
        seen: list[tuple[float, float, Any]] = []
        drawing = task.draw(self.target, plan.trials, plan.seed, _BATCH * self.meter.boards)
        drawn = next(drawing, None)
        while drawn is not None:
            found = self._measured(task, drawn)
            seen += [(*f, one) for f, one in zip(found, drawn, strict=True) if f is not None]
            try:
                drawn = drawing.send([None if f is None else f[0] for f in found])
            except StopIteration:
                drawn = None
        seen.sort(key=lambda entry: entry[0])
        ratio, value, setting = self._confirmed(task, seen[:FINALISTS])
        value = value or min((v / r for r, v, _ in seen), default=0.0)
        return Record(
            template=task.name, version=task.version, op=records.op_key(task.key),
            features=records.features(self.target), knobs=task.plain(self.target, setting),
            ratio=round(ratio, 4), value=float(f"{value:.6g}"), unit=self.meter.unit,
            measured_on=self.meter.measured_on, trials=count, seed=plan.seed,
        )  # fmt: skip

    def _confirmed(
        self, task: Task, best: Sequence[tuple[float, float, Any]]
    ) -> tuple[float, float, Any | None]:
        """The best that gains every time it is measured, by its worst; ratio 1 for the default."""
        chosen: tuple[float, float, Any | None] = (1.0, 0.0, None)
        for ratio, value, setting in best:
            if ratio > 1 - LEAST_GAIN:
                break
            again = 0 if self.meter.unit == "instructions" else AGAIN
            repeated = [f for f in self._measured(task, [setting] * again) if f is not None]
            if len(repeated) < again:
                continue
            worst = max([ratio, *(r for r, _ in repeated)])
            if worst <= 1 - LEAST_GAIN and worst < chosen[0]:
                chosen = worst, min([value, *(v for _, v in repeated)]), setting
        return chosen

    def _measured(self, task: Task, settings: Sequence[Any]) -> list[tuple[float, float] | None]:
        """Ratio to the default and value of each setting; None where it could not be measured."""
        modules = [task.pair(self.target, setting) for setting in settings]
        # MetaSchedule's interface wants a target; the builder knows the real one.
        llvm = tvm.target.Target({"kind": "llvm"})
        built = self.builder.build([BuilderInput(module, llvm) for module in modules])
        paths = [str(b.artifact_path) if b.error_msg is None else None for b in built]
        futures = iter(self.meter.run([RunnerInput(path, "cpu", []) for path in paths if path]))
        found: list[tuple[float, float] | None] = []
        for path in paths:
            result = next(futures).result() if path else None
            if path:
                Path(path).unlink(missing_ok=True)
            if result is None or result.error_msg is not None:
                found.append(None)
                continue
            values = [float(v) for v in result.run_secs]
            ratio, value = compare(values[::2], values[1::2])
            found.append((ratio, value * self.scale))
        return found

    @property
    def scale(self) -> float:
        """From what a runner tells to the unit of records."""
        return 1.0 if self.meter.unit == "instructions" else 1e9


def compare(default: Sequence[float], own: Sequence[float]) -> tuple[float, float]:
    """Ratio to the default and the least value. The ratio is the larger of that of minima and the
    median of the rounds' own: either alone is misled by what else the machine does."""
    median = statistics.median(b / a for a, b in zip(default, own, strict=True))
    return max(median, min(own) / min(default)), min(own)
