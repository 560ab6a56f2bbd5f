"""Runs wasm bundles in Node, which is V8, the engine of Chromium."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from edgepipe.runners import _program
from edgepipe.runners._base import Availability, Timing
from edgepipe.target import Target

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgepipe.bundle import Bundle

NAME = "node"

_LEAST_MAJOR = 20
# V8 11.4 turned relaxed SIMD on; Node 20 has 11.3 and a flag, Node 21 has 11.8.
_RELAXED_MAJOR = 21
_FIX = "install Node 20 or later: https://nodejs.org/en/download"


def available(target: Target) -> Availability:
    """Whether a new enough Node is installed."""
    if target.kind != "wasm":
        return Availability(False, f"it runs wasm bundles, not {target.kind}")
    major = _major()
    if major is None:
        return Availability(False, "node is not installed", _FIX)
    if major < _LEAST_MAJOR:
        return Availability(False, f"node {major} is too old", _FIX)
    return Availability(True, f"node {major}")


def run_many(
    bundle: Bundle, samples: Sequence[Mapping[str, npt.NDArray[Any]]]
) -> list[dict[str, npt.NDArray[Any]]]:
    """Execute samples in one Node process, through model.mjs."""
    return _program.run_many(bundle, command(bundle.target), samples)


def bench(bundle: Bundle, runs: int, warmup: int) -> Timing:
    """Time inferences in Node. The first calls run V8's baseline code: warm up well."""
    words = command(bundle.target)
    return _program.bench(bundle, words, NAME, _engine(), runs, warmup, emulated=False)


def profile(bundle: Bundle, runs: int) -> dict[str, Any]:
    """Time each kernel in Node."""
    return _program.profile(bundle, command(bundle.target), _engine(), runs, emulated=False)


def _engine() -> str:
    return f"node {_version()}"


def command(target: Target | None = None) -> list[str]:
    """Node and the options that turn on what the target's variants use."""
    words = [shutil.which("node") or "node"]
    if target is not None and "relaxed" in target.variants and (_major() or 0) < _RELAXED_MAJOR:
        words.append("--experimental-wasm-relaxed-simd")
    return words


@cache
def _version() -> str:
    program = shutil.which("node")
    if program is None:
        return ""
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().removeprefix("v")


def _major() -> int | None:
    head = _version().partition(".")[0]
    return int(head) if head.isdigit() else None
