"""Settings of kernel templates."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgepipe import records
from edgepipe.context import Context
from edgepipe.kernels.template import Knobs, select
from edgepipe.lowering.emit import plain
from edgepipe.target import Target
from edgepipe.tuning import Ratios
from edgepipe.tuning.candidate import pair


@dataclass(frozen=True)
class Kernel:
    """A ``Task``: an operator, ``count`` times in a network, and the template that executes it."""

    template: Any
    op: Any
    count: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates per inference."""
        return self.count * int(getattr(self.op, "macs", 0))

    @property
    def name(self) -> str:
        return str(self.template.name)

    @property
    def version(self) -> int:
        return int(self.template.version)

    @property
    def key(self) -> Any:
        return self.op

    def size(self, target: Target) -> int:
        return len(self.template.settings(self.op, target))

    def draw(
        self, target: Target, trials: int, seed: int, batch: int
    ) -> Generator[Sequence[Knobs], Ratios, None]:
        text = f"{seed} {self.name} {records.op_key(self.op)}"
        space = self.template.settings(self.op, target)
        drawn = draw(space, self.template.default(self.op, target), trials, text)
        for start in range(0, len(drawn), batch):
            yield drawn[start : start + batch]

    def pair(self, target: Target, setting: Knobs) -> Any:
        default = self.template.default(self.op, target)
        return pair(*(self.template.emit(self.op, knobs) for knobs in (default, setting)))

    def plain(self, target: Target, setting: Knobs | None) -> Knobs:
        return plain(self.template.default(self.op, target) if setting is None else setting)


def tasks(graph: ir.Graph, context: Context) -> list[Kernel]:
    """Operators with settings, most work first; those that differ only in data are one."""
    found: dict[tuple[str, str], Kernel] = {}
    for node in graph.all_nodes():
        kernel = node.meta.get("kernel")
        if kernel is None:
            continue
        template, _ = select(kernel.op, context.target)
        if template is None or not template.settings(kernel.op, context.target):
            continue
        key = template.name, records.op_key(kernel.op)
        count = found[key].count + 1 if key in found else 1
        found[key] = Kernel(template, kernel.op, count)
    return sorted(found.values(), key=lambda task: -task.macs)


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
