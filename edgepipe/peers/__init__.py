"""Other engines, which run the same model in turn with a bundle. Each is one module, found by its
file.

A peer module has

- ``RUNNERS``: whose times its own can be compared with: "local" (this CPU), "node", "browser"
- ``missing() -> str``: the command that would install it, "" where it is there; never raises
- ``engines(case) -> list of Engine``: the model, once per form that the bundle has, on
  ``case.threads``

An engine is given the golden inputs, and what it computes is compared with the bundle's outputs: if
both did not compute the same, comparing times would be idle.
"""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle
    from edgepipe.reference import Reference

Outputs = Mapping[str, Any]


@dataclass(frozen=True)
class Engine:
    """One engine with the model loaded. ``measure(runs, warmup)`` gives the median and the minimum
    of one inference in ms, ``outputs()`` what it computes by the bundle's output names.
    ``first_ms()``, of engines in pages: from its code and the model in memory to the first result,
    in a page of its own."""

    name: str
    measure: Callable[[int, int], tuple[float, float]]
    outputs: Callable[[], Outputs]
    first_ms: Callable[[], float] | None = None


@dataclass(frozen=True)
class Case:
    """A bundle and where its original is; ``file`` is another form of the model, as
    ``NAME=FILE`` gives it, ``runner`` what the bundle runs through, ``threads`` how many."""

    bundle: Bundle
    model: str | Path | None = None
    file: Path | None = None
    runner: str = "local"
    threads: int = 1

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The golden inputs by name."""
        return dict(self.bundle.golden()[0])

    @cached_property
    def reference(self) -> Reference:
        """The original model. Raises UserError where it is not found."""
        from edgepipe.reference import open_reference

        return open_reference(self.bundle, self.model)

    def onnx_forms(self) -> dict[str, bytes]:
        """The original, and the bundle's Q/DQ model where it has one, by what is added to the
        engine's name."""
        forms = {"": self.reference.source.proto_bytes()}
        if "model.qdq.onnx" in self.bundle.manifest["files"]:
            forms[", Q/DQ"] = self.bundle.file("model.qdq.onnx").read_bytes()
        return forms


def names() -> list[str]:
    """What ``--against`` takes, sorted."""
    found = (m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))
    return sorted(name.replace("_", "-") for name in found)


def engines(case: Case, wanted: str, runner: str) -> list[Engine]:
    """The engines of the peer ``wanted``, ``NAME`` or ``NAME=FILE``, beside times that ``runner``
    gave. Raises UserError."""
    name, _, file = wanted.partition("=")
    if name not in names():
        raise UserError(f"unknown engine '{name}'", where="--against",
                        fix=did_you_mean(name, [*names(), "none"]))  # fmt: skip
    peer: Any = importlib.import_module(f"edgepipe.peers.{name.replace('-', '_')}")
    if runner.partition(":")[0] not in peer.RUNNERS:
        where = " or ".join(f"'{r}'" for r in peer.RUNNERS)
        what = f"{name} runs as {where} does, the bundle as '{runner}': they cannot be compared"
        raise UserError(what, where="--against", fix=f"leave it out, or --runner {peer.RUNNERS[0]}")
    if command := peer.missing():
        raise UserError(f"{name} is not installed", where="--against", fix=command)
    if file and not Path(file).is_file():
        raise UserError("no such file", where=file)
    found: list[Engine] = peer.engines(replace(case, file=Path(file) if file else None))
    return found


def timed(infer: Callable[[], Any]) -> Callable[[int, int], tuple[float, float]]:
    """``measure`` of an engine in this process."""

    def measure(runs: int, warmup: int) -> tuple[float, float]:
        for _ in range(warmup):
            infer()
        times = []
        for _ in range(runs):
            start = time.perf_counter_ns()
            infer()
            times.append((time.perf_counter_ns() - start) / 1e6)
        return statistics.median(times), min(times)

    return measure
