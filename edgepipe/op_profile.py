"""What each operator of a bundle takes on the device, beside what the device's core can do.

The bundle's own program times every kernel call twice: in its place in whole inferences, and warm,
repeated in place until the clock does not matter. It measures in the same run what the core
reaches at best: products of each kind in registers, and copies of blocks of several sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgepipe import runners
from edgepipe.display import table
from edgepipe.errors import UserError
from edgepipe.machine import machine, one_line, versions

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle


@dataclass(frozen=True)
class OpProfile:
    """One kernel call. ``us`` is its time in whole inferences, ``warm_us`` repeated in place.

    ``macs`` are those executed: what a sparse kernel skips or Winograd saves is left out. ``bytes``
    counts every tensor it reads or writes once. ``peak_per_s`` (two operations per product) and
    ``copy_per_s`` (bytes read and written, in blocks as large as the operator's tensors) are what
    the core reached in the same run; None where that was not measured.
    """

    op: str
    op_type: str
    kernel: str
    arithmetic: str
    macs: int
    bytes: int
    us: float
    warm_us: float
    peak_per_s: float | None
    copy_per_s: float | None

    @property
    def per_s(self) -> float:
        """Operations per second, warm."""
        return 2e6 * self.macs / self.warm_us if self.warm_us else 0.0

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second, warm."""
        return 1e6 * self.bytes / self.warm_us if self.warm_us else 0.0

    @property
    def of_peak(self) -> float | None:
        """Share of the core's operations per second, 0…1; None without any of them."""
        return self.per_s / self.peak_per_s if self.peak_per_s and self.macs else None

    @property
    def of_copy(self) -> float | None:
        """Share of the core's bytes per second."""
        return self.bytes_per_s / self.copy_per_s if self.copy_per_s else None

    @property
    def ideal_us(self) -> float:
        """What the operations alone would take at the peak; 0 without any."""
        return 2e6 * self.macs / self.peak_per_s if self.peak_per_s else 0.0

    @property
    def moving_us(self) -> float:
        """What moving the bytes alone would take at the speed of a copy."""
        return 1e6 * self.bytes / self.copy_per_s if self.copy_per_s else 0.0


@dataclass(frozen=True)
class Profile:
    """All operators in order. ``peaks`` are operations per second by kind, ``copies`` pairs of
    block size in bytes and bytes per second, ``inference_us`` the median of whole inferences."""

    bundle: str
    runner: str
    engine: str
    rounds: int
    inference_us: float
    ops: tuple[OpProfile, ...]
    peaks: dict[str, float]
    copies: tuple[tuple[int, float], ...]
    machine: dict[str, str]
    versions: dict[str, str]

    @property
    def ideal_us(self) -> float:
        """One inference if every operation ran at the core's peak and nothing else took time."""
        return sum(op.ideal_us for op in self.ops)

    @property
    def efficiency(self) -> float:
        """``ideal_us`` over what an inference takes, 0…1."""
        return self.ideal_us / self.inference_us if self.inference_us else 0.0

    def to_json(self) -> dict[str, Any]:
        """For ``json.dumps``; what follows from the rest is written out."""
        fields = asdict(self)
        for raw, op in zip(fields["ops"], self.ops, strict=True):
            raw |= {"per_s": op.per_s, "bytes_per_s": op.bytes_per_s, "of_peak": op.of_peak,
                    "of_copy": op.of_copy}  # fmt: skip
        return {**fields, "efficiency": self.efficiency, "ideal_us": self.ideal_us}

    def __str__(self) -> str:
        whole = max(sum(op.us for op in self.ops), 1e-9)
        rows = [
            [op.op.split(";")[0], op.op_type, f"{op.us:.2f}", f"{100 * op.us / whole:.1f}",
             f"{op.warm_us:.2f}", f"{op.macs / 1e6:.2f}", f"{op.bytes / 1024:.1f}",
             f"{op.per_s / 1e9:.1f}", _percent(op.of_peak), f"{op.bytes_per_s / 1e9:.1f}",
             _percent(op.of_copy), op.kernel]
            for op in self.ops
        ]  # fmt: skip
        headers = ["operator", "type", "µs", "%", "warm µs", "MMAC", "KB", "GOP/s", "% of peak",
                   "GB/s", "% of copy", "kernel"]  # fmt: skip
        peaks = ", ".join(f"{k} {v / 1e9:.1f} GOP/s" for k, v in self.peaks.items())
        copies = ", ".join(f"{size // 1024} KB {v / 1e9:.1f}" for size, v in self.copies)
        share = f"{100 * self.efficiency:.0f} % of the core's peak over a whole inference: "
        ideal = f", {self.ideal_us / 1e3:.3f} ms at the peak"
        inference = f"{self.inference_us / 1e3:.3f} ms"
        return "\n".join([
            share + inference + ideal if self.peaks else f"a whole inference: {inference}",
            "", table(headers, rows), "",
            f"operators in their places sum to {whole / 1e3:.3f} ms, warm repetitions to "
            f"{sum(op.warm_us for op in self.ops) / 1e3:.3f} ms, of which rates and shares are",
            f"peaks measured in this run: {peaks or 'none'}",
            f"copies, by block, GB/s: {copies or 'none'}",
            f"{self.bundle} by {self.runner} ({self.engine}), {self.rounds} inferences, one thread",
            one_line(self.machine), one_line(self.versions),
        ])  # fmt: skip


def profile(bundle: Bundle, *, runner: str | None = None, runs: int = 200) -> Profile:
    """Profile ``bundle`` over ``runs`` inferences through ``runner`` (default: the target's).

    Raises UserError, for emulators too: their times say nothing of the device.
    """
    executor = runners.pick(bundle.target, runner)
    raw = executor.profile(bundle, runs)
    if raw["emulated"]:
        what = f"'{executor.NAME}' emulates: its times say nothing of the device"
        raise UserError(what, where="--per-op", fix="measure on the board: --runner ssh:HOST")
    copies = tuple((int(c["bytes"]), float(c["bytes_per_s"])) for c in raw["copies"])
    kernels = bundle.manifest["kernels"]
    if len(kernels) != len(raw["steps"]):
        raise UserError("the manifest names other kernels than the program calls",
                        where=str(bundle.path), fix="compile the model again")  # fmt: skip
    return Profile(
        bundle=bundle.path.name, runner=executor.NAME, engine=str(raw["engine"]),
        rounds=int(raw["rounds"]), inference_us=float(raw["inference_us"]),
        ops=tuple(_op(k, s, raw["peaks"], copies)
                  for k, s in zip(kernels, raw["steps"], strict=True)),
        peaks={k: float(v) for k, v in raw["peaks"].items()}, copies=copies, machine=machine(),
        versions=versions("edgepipe"),
    )  # fmt: skip


def _op(
    kernel: Mapping[str, Any], step: Mapping[str, float], peaks: Mapping[str, float],
    copies: Sequence[tuple[int, float]],
) -> OpProfile:  # fmt: skip
    size = int(kernel.get("weight_bytes", 0)) + int(kernel.get("activation_bytes", 0))
    kind = "int8" if kernel["arithmetic"].startswith("int8") else "float32"
    # The block nearest in size: its data were in the same cache, more or less.
    nearest = min(copies, key=lambda c: abs(math.log(c[0] / max(size, 1))), default=(0, None))
    return OpProfile(
        op=kernel["op"], op_type=kernel["op_type"], kernel=kernel["kernel"],
        arithmetic=kernel["arithmetic"], macs=executed_macs(kernel), bytes=size, us=step["us"],
        warm_us=step["warm_us"], peak_per_s=peaks.get(kind),
        copy_per_s=nearest[1],
    )  # fmt: skip


def executed_macs(kernel: Mapping[str, Any]) -> int:
    """Multiply-accumulates without those with zero weights that a sparse kernel leaves out, or that
    Winograd's transforms save."""
    sparsity, macs = kernel.get("sparsity"), int(kernel["macs"])
    skipped = sparsity["zeros"] if sparsity and sparsity["form"] != "dense" else 0.0
    return min(round(macs * (1 - skipped)), int(kernel.get("executed_macs", 0)) or macs)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"
