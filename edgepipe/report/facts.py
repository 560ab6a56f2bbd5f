"""What is known and measured of one bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgepipe import runners
from edgepipe.benchmark import Benchmark, in_turn
from edgepipe.bundle import Bundle
from edgepipe.errors import UserError
from edgepipe.layer_report import LayersReport
from edgepipe.op_profile import Profile
from edgepipe.runners import Timing
from edgepipe.validation_report import Report

#: Samples that layers are compared on: sums over all elements settle soon.
LAYER_SAMPLES = 32
_PROFILED = 50
#: A ratio of medians that is nearer to 1 is noise.
SLOWER = 1.05


@dataclass(frozen=True)
class Facts:
    """A bundle's sizes in bytes, its kernels, and where measured its validation and latency.

    ``kernels`` are the manifest's, one per operator, ``arena`` its memory plan: offset, bytes,
    first and last kernel of each tensor. ``quality``, ``timing``, ``benchmark``, ``profile`` and
    ``layers`` are None where they were not asked for or cannot be; ``why_not`` says why measuring
    failed.
    """

    name: str
    network: str
    target: str
    recipe: str
    code_bytes: int
    weights_bytes: int
    arena_bytes: int
    macs: int
    kernels: tuple[dict[str, Any], ...]
    quality: Report | None = None
    timing: Timing | None = None
    why_not: str = ""
    arena: tuple[tuple[int, int, int, int], ...] = ()
    benchmark: Benchmark | None = None
    profile: Profile | None = None
    layers: LayersReport | None = None

    @property
    def latency_ms(self) -> float | None:
        """Median latency on the device itself."""
        if self.timing is None or self.timing.emulated:
            return None
        return self.benchmark.ours.median_ms if self.benchmark else self.timing.p50_ms

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy in 0…1 where the data had labels."""
        return self.quality.accuracy if self.quality else None

    @property
    def snr_db(self) -> float | None:
        """The worst output's SNR against the original model."""
        outputs = self.quality.outputs if self.quality else ()
        return min((o.snr_db for o in outputs), default=None)


def slower_than_float(f: Facts, others: Sequence[Facts]) -> str | None:
    """A line where a quantized or sparse bundle measured slower than the float32 one of the same
    network and target among ``others``."""
    floats = [o for o in others if o.recipe == "fp32" and o is not f and o.latency_ms
              and (o.network, o.target) == (f.network, f.target)]  # fmt: skip
    if f.recipe == "fp32" or not f.latency_ms or not floats:
        return None
    best = min(floats, key=lambda o: o.latency_ms or 0)
    times = f.latency_ms / (best.latency_ms or 1)
    if times <= SLOWER:
        return None
    return (f"{f.name} ({f.recipe}) is slower than {best.name} (fp32), as measured: "
            f"{times:.2f} times its median latency")  # fmt: skip


def slower(bundles: Sequence[Facts]) -> list[str]:
    """``slower_than_float`` of each of ``bundles`` that is."""
    return [line for f in bundles if (line := slower_than_float(f, bundles))]


def gather(
    bundle: Bundle, *, data: str | None = None, runner: str | None = None, runs: int = 200,
    measure: bool = True, against: Sequence[str] | None = ("none",), details: bool = False,
    time: bool = True, progress: Callable[[str], None] = lambda line: None,
) -> Facts:  # fmt: skip
    """The facts of ``bundle``; unless ``measure`` is False, validated on ``data`` and timed in turn
    with the engines ``against`` (see ``edgepipe.benchmark.bench``), with ``details`` operator by
    operator and layer by layer too. Without ``time`` it is only validated.

    A bundle that nothing here can run keeps what its manifest says, and the reason.
    """
    files = bundle.manifest["files"]
    memory = bundle.manifest["memory"]
    measured: dict[str, Any] = {}
    if measure:
        try:
            progress(f"validating {bundle.path.name}")
            measured["quality"] = bundle.validate(data=data, runner=runner)
            if time:
                measured |= _timed(bundle, runner, runs, against, progress)
                if details:
                    _add_details(measured, bundle, data, runner, progress)
        except UserError as error:
            measured["why_not"] = str(error)
    return Facts(
        name=bundle.path.name,
        network=str(bundle.manifest["source"]["name"]),
        target=bundle.target.name,
        recipe=str(bundle.recipe),
        code_bytes=files[bundle.code_file]["bytes"],
        weights_bytes=files["weights.bin"]["bytes"],
        arena_bytes=memory["arena_bytes"],
        macs=bundle.manifest["macs"],
        kernels=tuple(bundle.manifest["kernels"]),
        arena=tuple(tuple(piece) for piece in memory.get("arena", ())),
        **measured,
    )


def gather_each(bundles: Sequence[Bundle], **options: Any) -> list[Facts]:
    """The facts of ``bundles``, one after the other, with the options of ``gather``."""
    return [gather(bundle, **options) for bundle in bundles]


def gather_in_turn(
    bundles: Sequence[Bundle], *, data: str | None = None, runner: str | None = None,
    runs: int = 200, measure: bool = True, progress: Callable[[str], None] = lambda line: None,
) -> list[Facts]:  # fmt: skip
    """The facts of ``bundles``, whose inferences are timed in turn: a machine's drift is theirs
    alike."""
    found = [gather(bundle, data=data, runner=runner, measure=measure, time=False,
                    progress=progress) for bundle in bundles]  # fmt: skip
    able = [i for i, facts in enumerate(found) if measure and not facts.why_not]
    if able:
        progress("measuring in turn")
    timings = in_turn([bundles[i] for i in able], runner=runner, runs=runs)
    for i, timing in zip(able, timings, strict=True):
        found[i] = replace(found[i], timing=timing)
    return found


def _timed(
    bundle: Bundle, runner: str | None, runs: int, against: Sequence[str] | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    progress(f"measuring {bundle.path.name}")
    here = runners.pick(bundle.target, runner).NAME == "local"
    peers = against if here else ("none",)  # they run on this CPU
    missing: list[str] = []
    result: Benchmark = bundle.bench(runner=runner, runs=runs, against=peers, missing=missing)
    return {"benchmark": result, "timing": result.timing, "why_not": "; ".join(missing)}


def _add_details(
    measured: dict[str, Any], bundle: Bundle, data: str | None, runner: str | None,
    progress: Callable[[str], None],
) -> None:  # fmt: skip
    from edgepipe.layer_validation import validate_layers
    from edgepipe.op_profile import profile

    if "model.qdq.onnx" in bundle.manifest["files"]:
        progress(f"comparing the layers of {bundle.path.name}")
        measured["layers"] = validate_layers(bundle, data, limit=LAYER_SAMPLES)
    timing: Timing = measured["timing"]
    if not timing.emulated and timing.runner != "wasmtime":
        progress(f"profiling {bundle.path.name}")
        measured["profile"] = profile(bundle, runner=runner, runs=_PROFILED)
