"""The shape of a kernel template, and how the one for an operator is found.

A template is one file in this folder with a module-level ``TEMPLATE``. ``matches`` returns None
when the template can do the operator and the reason when it cannot; among those that match, the
highest ``rank`` wins, so that a specialised template precedes a general one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from edgepipe.kernels.ops import Op
from edgepipe.target import Target

Knobs = dict[str, Any]


@dataclass(frozen=True)
class KernelTemplate:
    """A parameterised kernel: what it can do, how it is chosen, emitted and fed.

    ``emit(op, knobs)`` returns a PrimFunc over flat buffers: activations in, packed weights,
    residuals, activation out. ``pack(op, knobs, arrays)`` lays the weights out as ``emit`` reads
    them. ``default`` needs no tuning; ``knobs`` lists every setting a tuner may try, all of which
    compute the same bits. ``version`` is raised when a setting comes to mean another kernel, which
    makes tuning records of the old one stale.
    """

    name: str
    matches: Callable[[Op, Target], str | None]
    default: Callable[[Any, Target], Knobs]
    emit: Callable[[Any, Knobs], Any]
    pack: Callable[[Any, Knobs, Sequence[np.ndarray]], list[np.ndarray]] = (
        lambda op, knobs, arrays: list(arrays)
    )
    knobs: Callable[[Any, Target], list[Knobs]] = lambda op, target: []
    #: int32 elements of buffers that a kernel needs for itself; they follow the output.
    scratch: Callable[[Any, Knobs], tuple[int, ...]] = lambda op, knobs: ()
    #: Knobs of the kernel in a variant of the bundle's code, None for the same kernel. It reads
    #: the same weights and takes the same arguments.
    variant: Callable[[Any, Knobs, str], Knobs | None] = lambda op, knobs, name: None
    #: Multiply-accumulates that a kernel does, what fills its tiles included; 0: not known.
    executed: Callable[[Any, Knobs], int] = lambda op, knobs: 0
    rank: int = 0
    version: int = 1
    arithmetic: str = "float32"
    accumulator: str = "float32"

    def settings(self, op: Any, target: Target) -> list[Knobs]:
        """All knobs on offer, the default rule's first; empty where there is nothing to choose."""
        default = self.default(op, target)
        others = [knobs for knobs in self.knobs(op, target) if knobs != default]
        return [default, *others] if others else []


@cache
def templates(package_name: str = "edgepipe.kernels") -> tuple[KernelTemplate, ...]:
    """Every template in this package, best first."""
    package = importlib.import_module(package_name)
    found = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package_name}.{info.name}")
        template = getattr(module, "TEMPLATE", None)
        if template is not None:
            found.append(template)
    return tuple(sorted(found, key=lambda t: (-t.rank, t.name)))


def select(op: Op, target: Target) -> tuple[KernelTemplate | None, list[str]]:
    """Return the template for ``op`` and why better-ranked ones did not apply."""
    reasons: list[str] = []
    own = "edgepipe.kernels.cuda" if target.kind == "cuda" else "edgepipe.kernels"
    for template in templates(own):
        reason = template.matches(op, target)
        if reason is None:
            return template, reasons
        if reason:
            reasons.append(f"{template.name}: {reason}")
    return None, reasons
