"""Search of kernel templates' settings, by measuring them.

``tasks`` lists the operators of a network; ``search.tune`` measures settings of each through the
builder and runner interfaces of TVM's MetaSchedule and appends what it found to a file of records
(``edgepipe.records``), from which an interrupted tuning goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgepipe import records
from edgepipe.context import Context


@dataclass(frozen=True)
class Plan:
    """What to do: ``trials`` settings of every operator, drawn with ``seed``, recorded in ``file``;
    ``runner`` measures, None for the target's first."""

    trials: int
    file: Path
    runner: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """An operator of a network, ``count`` times in it, and the template that executes it."""

    template: Any
    op: Any
    count: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per inference."""
        return self.count * int(getattr(self.op, "macs", 0))


def tasks(graph: ir.Graph, context: Context) -> list[Task]:
    """What there is to choose in ``graph`` (after ``lowering.describe_kernels``), most work first.

    Operators that differ only in data, such as quantization ranges, are one task.
    """
    from edgepipe.kernels.template import select

    found: dict[tuple[str, str], Task] = {}
    for node in graph.all_nodes():
        kernel = node.meta.get("kernel")
        if kernel is None:
            continue
        template, _ = select(kernel.op, context.target)
        if template is None or not template.settings(kernel.op, context.target):
            continue
        key = template.name, records.op_key(kernel.op)
        count = found[key].count + 1 if key in found else 1
        found[key] = Task(template, kernel.op, count)
    return sorted(found.values(), key=lambda task: -task.macs)
