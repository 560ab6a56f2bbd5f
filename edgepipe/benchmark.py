"""How fast a bundle is, beside a peer measured in turn with it in the same run.

Machines drift by tens of per cent within minutes, so bundle and peer take turns, a fraction of
the inferences each, and the ratio is taken from medians. What an emulator gives is printed as
what it is and never compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import peers, runners
from edgepipe.codegen.plan import MOST_THREADS
from edgepipe.display import db_text, table
from edgepipe.errors import UserError
from edgepipe.machine import cores, machine, one_line, versions
from edgepipe.peers import Case, Engine
from edgepipe.validation_report import plain

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle

ROUNDS = 5
#: An engine that is given what the bundle computes, and is further from it than this, has another
#: model. (The original of a quantized or pruned bundle may be as far as it likes.)
LEAST_SNR_DB = 20.0


@dataclass(frozen=True)
class Latency:
    """One engine's latency of one inference in milliseconds.

    ``median_ms`` is the median of the rounds' medians; ``low_ms`` and ``high_ms`` are the
    smallest and the largest of them; ``min_ms`` is the fastest single inference. ``snr_db``: how
    near a peer's outputs are to the bundle's.
    """

    engine: str
    median_ms: float
    low_ms: float
    high_ms: float
    min_ms: float
    emulated: bool = False
    snr_db: float | None = None

    @classmethod
    def of(
        cls, engine: str, medians: Sequence[float], minima: Sequence[float],
        emulated: bool = False, snr_db: float | None = None,
    ) -> Latency:  # fmt: skip
        """Summarise rounds."""
        middle = statistics.median(medians)
        return cls(engine, middle, min(medians), max(medians), min(minima), emulated, snr_db)


@dataclass(frozen=True)
class Benchmark:
    """The result: ``ours`` and ``peers`` with the conditions they were measured under.

    ``original``: whether the bundle computes the original model, and no quantized or pruned one.
    ``timing`` is the runner's own of the middle round: percentiles, memory, what the board told.
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
    original: bool = True

    @property
    def threads(self) -> int:
        """How many shared an inference, of the bundle and of each peer."""
        return 1 if self.timing is None else self.timing.threads

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
        fields: dict[str, Any] = plain(asdict(self))
        return {"ratios": self.ratios, "threads": self.threads, **fields}

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
            [r.engine, *(f"{v:.3f}" for v in (r.median_ms, r.low_ms, r.high_ms, r.min_ms)),
             "–" if r.snr_db is None else db_text(r.snr_db)]
            for r in (self.ours, *self.peers)
        ]  # fmt: skip
        headers = ["engine", "median ms", "lowest median", "highest median", "min ms", "same, dB"]
        lines += [
            f"{r.engine}: its outputs are {db_text(r.snr_db)} dB from the bundle's: another model?"
            for r in self.peers
            if self.original and r.snr_db is not None and r.snr_db < LEAST_SNR_DB
        ]  # fmt: skip
        return "\n".join(
            [
                *lines,
                "",
                table(headers, rows),
                "",
                f"{self.bundle}, {self.rounds} rounds of {self.runs // self.rounds} inferences, "
                "one thread"
                if self.threads == 1
                else f"{self.threads} threads",
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
    threads: int | None = None,
    missing: list[str] | None = None,
) -> Benchmark:
    """Measure ``bundle`` through ``runner``, in turn with the engines ``against``.

    ``against`` names peers (``edgepipe.peers``), ``NAME`` or ``NAME=FILE``; by default ONNX Runtime
    where the runner executes on this machine's CPU and the original model is found (or given by
    ``model``), else nothing; "none" asks for nothing. All run on as many threads as the bundle was
    compiled for, or on ``threads``. Raises UserError; of
    engines that cannot take this bundle ``missing``, where it is given, is told why instead.
    """
    executor = runners.pick(bundle.target, runner)
    if threads is not None:
        bundle = bundle.with_threads(threads)
    if bundle.threads == 0 and executor.NAME == "local":  # peers are told a number
        bundle = bundle.with_threads(min(cores(), MOST_THREADS))
    case = Case(bundle, model, runner=executor.NAME, threads=bundle.threads or 1)
    engines = _engines(case, executor.NAME, against, missing)
    same = _agreement(bundle, executor, engines)
    rounds = min(ROUNDS, runs)
    per_round = runs // rounds
    warmup = warmup_runs(executor, per_round)
    ours: list[runners.Timing] = []
    theirs: list[list[tuple[float, float]]] = [[] for _ in engines]
    if engines:
        for _ in range(rounds):
            ours.append(executor.bench(bundle, per_round, warmup))
            for engine, times in zip(engines, theirs, strict=True):
                times.append(engine.measure(per_round, warmup))
    else:  # one start of the device or the browser serves all rounds
        ours.append(executor.bench(bundle, per_round * rounds, warmup))
    return Benchmark(
        bundle=bundle.path.name,
        runner=executor.NAME,
        ours=_ours(ours),
        peers=tuple(
            Latency.of(engine.name, [m for m, _ in times], [low for _, low in times], snr_db=snr)
            for engine, times, snr in zip(engines, theirs, same, strict=True)
        ),
        runs=per_round * rounds,
        rounds=rounds,
        machine=machine(),
        original=not bundle.recipe.quantizes and bundle.recipe.sparsity is None,
        timing=_middle(ours),
        versions=versions("edgepipe", "onnxruntime") if theirs else versions("edgepipe"),
    )


def in_turn(
    bundles: Sequence[Bundle], *, runner: str | None = None, runs: int = 200
) -> list[runners.Timing]:
    """Measure ``bundles`` in turn, a fraction of the inferences each, and return of each the round
    with the middle median. Raises UserError."""
    executors = [runners.pick(bundle.target, runner) for bundle in bundles]
    rounds = min(ROUNDS, runs)
    timings: list[list[runners.Timing]] = [[] for _ in bundles]
    for _ in range(rounds):
        for bundle, executor, own in zip(bundles, executors, timings, strict=True):
            warmup = warmup_runs(executor, runs // rounds)
            own.append(executor.bench(bundle, runs // rounds, warmup))
    return [_middle(own) for own in timings]


def warmup_runs(executor: runners.Runner, per_round: int) -> int:
    """Inferences before ``per_round`` that are timed."""
    # Engines of WebAssembly run baseline code first.
    return max(3 if executor.NAME == "local" else 20, per_round // 4)


def _middle(timings: Sequence[runners.Timing]) -> runners.Timing:
    return sorted(timings, key=lambda t: t.p50_ms)[(len(timings) - 1) // 2]


def _ours(timings: Sequence[runners.Timing]) -> Latency:
    first = timings[0]
    name = f"edgepipe ({first.engine}{', ' + first.variant if first.variant else ''})"
    medians = [t.p50_ms for t in timings]
    if len(timings) == 1 and first.round_p50_ms:
        medians = list(first.round_p50_ms)
    return Latency.of(name, medians, [t.min_ms for t in timings], emulated=first.emulated)


def _engines(
    case: Case, runner: str, against: Sequence[str] | None, missing: list[str] | None
) -> list[Engine]:
    """What is measured in turn with the bundle; without a wish what there is."""
    if against is not None:
        found: list[Engine] = []
        for name in against:
            try:
                found += [] if name == "none" else peers.engines(case, name, runner)
            except UserError as error:
                if missing is None:
                    raise
                missing.append(str(error))
        return found
    if runner != "local":
        return []
    try:
        return peers.engines(case, "ort", runner)
    except UserError:
        if case.model is not None:
            raise
        return []


def _agreement(
    bundle: Bundle, executor: runners.Runner, engines: Sequence[Engine]
) -> list[float | None]:
    """How near each engine's outputs are to the bundle's, in dB; the worst output counts."""
    from edgepipe.metrics import Distance

    if not engines:
        return []
    (ours,) = executor.run_many(bundle, [bundle.golden()[0]])
    found: list[float | None] = []
    for engine in engines:
        distances = []
        for name, value in engine.outputs().items():
            distances.append(Distance())
            if value.size != ours[name].size:
                raise UserError(f"{engine.name} gives {list(value.shape)} for '{name}', the bundle "
                                f"{list(ours[name].shape)}", where="--against")  # fmt: skip
            distances[-1].add(value.reshape(ours[name].shape), ours[name])
        found.append(min((d.snr_db for d in distances), default=None))
    return found
