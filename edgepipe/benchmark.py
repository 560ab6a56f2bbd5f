"""How fast a bundle is, beside a peer measured in turn with it in the same run.

Machines drift by tens of per cent within minutes, so bundle and peer take turns, a fraction of
the inferences each, and the ratio is taken from medians. What an emulator gives is printed as
what it is and never compared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import runners
from edgepipe.display import table
from edgepipe.errors import UserError, did_you_mean
from edgepipe.machine import machine, one_line, versions
from edgepipe.reference import Reference, open_reference

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle

#: Engines that a bundle can be measured against in this process's machine.
PEERS = ("ort",)

ROUNDS = 5


@dataclass(frozen=True)
class Latency:
    """One engine's latency of one inference in milliseconds.

    ``median_ms`` is the median of the rounds' medians; ``low_ms`` and ``high_ms`` are the
    smallest and the largest of them; ``min_ms`` is the fastest single inference.
    """

    engine: str
    median_ms: float
    low_ms: float
    high_ms: float
    min_ms: float
    emulated: bool = False

    @classmethod
    def of(
        cls, engine: str, medians: Sequence[float], minima: Sequence[float], emulated: bool = False
    ) -> Latency:
        """Summarise rounds."""
        middle = statistics.median(medians)
        return cls(engine, middle, min(medians), max(medians), min(minima), emulated)


@dataclass(frozen=True)
class Benchmark:
    """The result: ``ours`` and ``peers`` with the conditions they were measured under.

    ``timing`` is the runner's own of the last round: percentiles, memory, what the board told.
    """

    bundle: str
    runner: str
    ours: Latency
    peers: tuple[Latency, ...]
    runs: int
    rounds: int
    machine: dict[str, str]
    versions: dict[str, str]
    timing: runners.Timing | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """Ours over each peer's median: below 1 the bundle is faster. Empty where emulated."""
        if self.ours.emulated:
            return {}
        return {peer.engine: self.ours.median_ms / peer.median_ms for peer in self.peers}

    def _board(self) -> list[str]:
        """A line on percentiles and on what the device told of its state."""
        if self.timing is None or self.ours.emulated:
            return []
        told = {"p90_ms": self.timing.p90_ms, "p99_ms": self.timing.p99_ms, **self.timing.board}
        parts = [f"{name.rpartition('_')[0]} {v:.4g} {name.rpartition('_')[2]}"
                 for name, v in told.items()]  # fmt: skip
        governor = self.timing.cpu_governor
        return [", ".join([*parts, *([f"governor {governor}"] if governor else [])])]

    def to_json(self) -> dict[str, Any]:
        """The result for ``json.dumps``."""
        return {"ratios": self.ratios, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{ratio:.2f} × {engine} ({'faster' if ratio < 1 else 'slower'})"
            for engine, ratio in self.ratios.items()
        ]
        if self.runner == "wasmtime":
            lines.append("wasmtime: its times are no proxy for those of a browser")
        if self.ours.emulated:
            lines.append("emulated: these times are the emulator's and say nothing of the device")
        rows = [
            [r.engine, *(f"{v:.3f}" for v in (r.median_ms, r.low_ms, r.high_ms, r.min_ms))]
            for r in (self.ours, *self.peers)
        ]
        headers = ["engine", "median ms", "lowest median", "highest median", "min ms"]
        return "\n".join(
            [
                *lines,
                "",
                table(headers, rows),
                "",
                f"{self.bundle}, {self.rounds} rounds of {self.runs // self.rounds} inferences, "
                "one thread",
                *self._board(),
                one_line(self.machine),
                one_line(self.versions),
            ]
        ).lstrip("\n")


def bench(
    bundle: Bundle,
    *,
    runner: str | None = None,
    against: Sequence[str] | None = None,
    runs: int = 200,
    model: str | Path | None = None,
) -> Benchmark:
    """Measure ``bundle`` through ``runner``, in turn with the engines ``against``.

    ``against`` is by default ONNX Runtime on one thread where the runner executes on this
    machine's CPU and the original model is found (or given by ``model``), else nothing; "none"
    asks for nothing. Raises UserError.
    """
    executor = runners.pick(bundle.target, runner)
    reference = _reference(bundle, executor.NAME, against, model)
    rounds = min(ROUNDS, runs)
    per_round = runs // rounds
    warmup = max(3, per_round // 4)
    peer = _ort(bundle, reference) if reference else None
    ours, theirs = [], []
    if peer:
        for _ in range(rounds):
            ours.append(executor.bench(bundle, per_round, warmup))
            theirs.append(peer(per_round, warmup))
    else:  # one start of the device or the browser serves all rounds
        ours.append(executor.bench(bundle, per_round * rounds, warmup))
    first = ours[0]
    name = f"edgepipe ({first.engine}{', ' + first.variant if first.variant else ''})"
    latency = Latency.of(
        name,
        [t.p50_ms for t in ours] if peer else first.round_p50_ms or [first.p50_ms],
        [t.min_ms for t in ours],
        emulated=first.emulated,
    )
    peers: tuple[Latency, ...] = ()
    if theirs:
        engine = f"ONNX Runtime {versions('onnxruntime')['onnxruntime']}"
        peers = (Latency.of(engine, [m for m, _ in theirs], [low for _, low in theirs]),)
    return Benchmark(
        bundle=bundle.path.name,
        runner=executor.NAME,
        ours=latency,
        peers=peers,
        runs=per_round * rounds,
        rounds=rounds,
        machine=machine(),
        timing=ours[-1],
        versions=versions("edgepipe", "onnxruntime") if theirs else versions("edgepipe"),
    )


def _reference(
    bundle: Bundle, runner: str, against: Sequence[str] | None, model: str | Path | None
) -> Reference | None:
    """The model for the peer, or None where there is nothing to compare with."""
    comparable = runner == "local"
    if against is None:
        if not comparable:
            return None
        try:
            return open_reference(bundle, model)
        except UserError:
            if model is not None:
                raise
            return None
    if tuple(against) == ("none",):
        return None
    for engine in against:
        if engine not in PEERS:
            raise UserError(
                f"unknown engine '{engine}'", where="--against", fix=did_you_mean(engine, PEERS)
            )
    if not comparable:
        raise UserError(
            f"ONNX Runtime runs on this machine's CPU, the bundle through '{runner}': "
            "their times cannot be compared",
            where="--against",
            fix="leave it out, or see benchmarks/latency_node.py for onnxruntime-web",
        )
    return open_reference(bundle, model)


def _ort(bundle: Bundle, reference: Reference) -> Callable[[int, int], tuple[float, float]]:
    """A function (runs, warmup) → (median, min) in ms of ONNX Runtime on one thread."""
    session = reference.session
    inputs = dict(bundle.golden()[0])

    def measure(runs: int, warmup: int) -> tuple[float, float]:
        for _ in range(warmup):
            session.run(None, inputs)
        times = []
        for _ in range(runs):
            start = time.perf_counter_ns()
            session.run(None, inputs)
            times.append((time.perf_counter_ns() - start) / 1e6)
        return statistics.median(times), min(times)

    return measure
