"""What is known and measured of one bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgepipe.bundle import Bundle
from edgepipe.errors import UserError
from edgepipe.runners import Timing
from edgepipe.validation_report import Report


@dataclass(frozen=True)
class Facts:
    """A bundle's sizes in bytes, its kernels, and where measured its validation and latency.

    ``kernels`` are the manifest's, one per operator. ``quality`` and ``timing`` are None where they
    were not asked for; ``why_not`` says why measuring failed.
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

    @property
    def latency_ms(self) -> float | None:
        """Median latency on the device itself."""
        return None if self.timing is None or self.timing.emulated else self.timing.p50_ms

    @property
    def accuracy(self) -> float | None:
        """Top-1 accuracy in 0…1 where the data had labels."""
        return self.quality.accuracy if self.quality else None

    @property
    def snr_db(self) -> float | None:
        """The worst output's SNR against the original model."""
        outputs = self.quality.outputs if self.quality else ()
        return min((o.snr_db for o in outputs), default=None)


def gather(
    bundle: Bundle, *, data: str | None = None, runner: str | None = None, runs: int = 200,
    measure: bool = True, progress: Callable[[str], None] = lambda line: None,
) -> Facts:  # fmt: skip
    """The facts of ``bundle``; unless ``measure`` is False, validated on ``data`` and timed.

    A bundle that nothing here can run keeps what its manifest says, and the reason.
    """
    files = bundle.manifest["files"]
    code = next(n for n in ("model.relaxed.wasm", "model.wasm", "model.so") if n in files)
    memory = bundle.manifest["memory"]
    quality, timing, why_not = None, None, ""
    if measure:
        try:
            progress(f"validating {bundle.path.name}")
            quality = bundle.validate(data=data, runner=runner)
            progress(f"measuring {bundle.path.name}")
            timing = bundle.bench(runner=runner, runs=runs, against=("none",)).timing
        except UserError as error:
            why_not = str(error)
    return Facts(
        name=bundle.path.name,
        network=str(bundle.manifest["source"]["name"]),
        target=bundle.target.name,
        recipe=str(bundle.recipe),
        code_bytes=files[code]["bytes"],
        weights_bytes=files["weights.bin"]["bytes"],
        arena_bytes=memory["arena_bytes"],
        macs=bundle.manifest["macs"],
        kernels=tuple(bundle.manifest["kernels"]),
        quality=quality,
        timing=timing,
        why_not=why_not,
    )
