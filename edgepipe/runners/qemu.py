"""Runs native bundles for ARM in user-mode emulation; the CPU model refuses what it lacks.

Numerics are the device's, times are not: an instruction the CPU model does not have raises
SIGILL, but speed says nothing about the device.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgepipe.runners import _program
from edgepipe.runners._base import Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

NAME = "qemu"


def available(target: Target) -> Availability:
    """Whether qemu for the target's architecture is installed."""
    if not target.run.qemu:
        return Availability(False, f"{target.name} names no qemu program")
    if program := _find(target):
        return Availability(True, program)
    return Availability(
        False, f"{target.run.qemu} is not installed", "apt-get install qemu-user-static"
    )


def run_many(
    bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[dict[str, npt.NDArray[Any]]]:
    """Execute samples in one emulated process."""
    return _program.run_many(bundle, command(bundle.target), samples)


def bench(bundle: Bundle, runs: int, warmup: int) -> Timing:
    """Time the emulation; the result is marked as emulated."""
    words = command(bundle.target)
    return _program.bench(bundle, words, NAME, _engine(bundle), runs, warmup, emulated=True)


def profile(bundle: Bundle, runs: int) -> dict[str, Any]:
    """Time the emulation kernel by kernel; the result is marked as emulated."""
    return _program.profile(bundle, command(bundle.target), _engine(bundle), runs, emulated=True)


def _engine(bundle: Bundle) -> str:
    return f"{bundle.target.run.qemu} -cpu {bundle.target.run.qemu_cpu or 'default'}"


def command(target: Target) -> list[str]:
    """The emulator and its options, to put before a program."""
    words = [_find(target) or target.run.qemu]
    return [*words, "-cpu", target.run.qemu_cpu] if target.run.qemu_cpu else words


def _find(target: Target) -> str | None:
    return shutil.which(f"{target.run.qemu}-static") or shutil.which(target.run.qemu)
