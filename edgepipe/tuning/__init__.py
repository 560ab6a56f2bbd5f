"""Search of what makes kernels fast, by measuring them: settings of templates, and schedules by
MetaSchedule's rules of what no template executes.

``tasks`` lists the operators of a network; ``search.tune`` measures settings of each through the
builder and runner interfaces of TVM's MetaSchedule and appends what it found to a file of records
(``edgepipe.records``), from which an interrupted tuning goes on.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

from edgepipe.context import Context

if TYPE_CHECKING:
    from edgepipe.target import Target

#: Of each setting that was measured, its ratio to the default; None where it failed.
Ratios = Sequence[float | None]


@dataclass(frozen=True)
class Plan:
    """What to do: ``trials`` settings of every operator, drawn with ``seed``, recorded in ``file``;
    ``runner`` measures, None for the target's first."""

    trials: int
    file: Path
    runner: str | None = None
    seed: int = 0


class Task(Protocol):
    """An operator of a network and what there is to choose. A setting is what ``draw`` yields."""

    @property
    def name(self) -> str:
        """Of the template, or what stands for it in records."""

    @property
    def version(self) -> int:
        """Records of another version are stale."""

    @property
    def key(self) -> Any:
        """The operator, as ``records.op_key`` takes it."""

    def size(self, target: Target) -> int | None:
        """How many settings there are; None where nobody knows."""

    def draw(
        self, target: Target, trials: int, seed: int, batch: int
    ) -> Generator[Sequence[Any], Ratios, None]:
        """Yields ``trials`` settings or all there are, some at a time, and is sent their ratios."""

    def pair(self, target: Target, setting: Any) -> Any:
        """IRModule of the default kernel and that with ``setting``, see ``candidate.SYMBOLS``."""

    def plain(self, target: Target, setting: Any | None) -> dict[str, Any]:
        """A setting, None for the default, as a record has it."""


def tasks(subject: ir.Graph | Any, context: Context) -> list[Task]:
    """What there is to choose in a graph (after ``lowering.describe_kernels``), most work first, or
    in the IRModule of what templates leave (see ``lowering.lower``)."""
    if isinstance(subject, ir.Graph):
        from edgepipe.tuning import knobs

        return list(knobs.tasks(subject, context))
    from edgepipe.tuning import rules

    return list(rules.tasks(subject, context))
