"""What runners tell: whether they can run, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Availability:
    """Whether a runner can run a target's bundles on this machine.

    ``reason`` says what is there or what lacks; ``fix`` is the exact command that would add it,
    "" where none can.
    """

    ok: bool
    reason: str
    fix: str = ""


@dataclass(frozen=True)
class Timing:
    """Latency of one inference over ``runs`` repetitions, measured after ``warmup`` others.

    ``emulated`` marks times that say nothing about the device. ``engine`` names what executed
    the code. ``peak_rss_bytes`` is the whole process's, None where unknown.
    """

    runner: str
    engine: str
    emulated: bool
    runs: int
    warmup: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    peak_rss_bytes: int | None = None
    cpu_governor: str = ""
    variant: str = ""
