"""What runners tell: whether they can run, and how long it took; and where they are to run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from edgepipe.errors import UserError, did_you_mean

#: Seconds without a sign of life after which a device or a browser is given up.
TIMEOUT_S = 600.0
#: How often a connection that broke is tried again, after 1 s, 2 s and so on.
RETRIES = 2


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
    the code. ``peak_rss_bytes`` is the whole process's, None where unknown. ``round_p50_ms`` are
    the medians of five consecutive parts of the runs, () where fewer were made.
    ``inferences_per_timing`` is above 1 where the clock is too coarse for one inference: the
    distribution is then of means over so many. ``board`` is what else the device tells
    (``clock_mhz``, ``temperature_c``, ``power_w``, …), by name. ``threads`` shared an inference.
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
    round_p50_ms: tuple[float, ...] = ()
    inferences_per_timing: int = 1
    board: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1


@dataclass(frozen=True)
class Address:
    """Where a runner runs: ``NAME[:WHERE][,KEY=VALUE…]`` without the name."""

    where: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> tuple[str, Address]:
        """The runner's name and its address. Raises UserError."""
        head, *parts = text.split(",")
        name, _, where = head.partition(":")
        options = {}
        for part in parts:
            key, separator, value = part.partition("=")
            if not separator:
                raise UserError(f"'{part}' is no KEY=VALUE", where="--runner",
                                fix="NAME:WHERE,KEY=VALUE, e.g. ssh:pi,timeout=60")  # fmt: skip
            options[key.strip()] = value
        return name, cls(where, options)

    def check(self, runner: str, known: Iterable[str]) -> None:
        """Refuse options that ``runner`` does not know. Raises UserError."""
        for key in self.options:
            if key not in (names := sorted({*known, "timeout"})):
                raise UserError(f"runner '{runner}' has no option '{key}'", where="--runner",
                                fix=did_you_mean(key, names))  # fmt: skip

    @property
    def timeout_s(self) -> float:
        """The option ``timeout``, in seconds. Raises UserError."""
        text = self.options.get("timeout", str(TIMEOUT_S))
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0
        if not 0 < seconds < 1e6:
            raise UserError(f"timeout '{text}' is no positive number of seconds", where="--runner")
        return seconds

    @property
    def retries(self) -> int:
        """The option ``retries``: how often a connection is tried again. Raises UserError."""
        text = self.options.get("retries", str(RETRIES))
        if not (text.isascii() and text.isdigit() and len(text) < 3):
            raise UserError(f"retries '{text}' is no number from 0 to 99", where="--runner")
        return int(text)
