"""Runs trials in worker processes, so that a crash is a result and not the end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.random_graphs.trial import RECIPES, TARGETS

ROOT = Path(__file__).resolve().parents[2]
#: Seed, recipe, target.
Key = tuple[int, str, str]
#: Trials compiled and linked together, and batches of one worker.
BATCH, BATCHES = 48, 20


def trials_of(seeds: Sequence[int], wasm_every: int = 1) -> list[Key]:
    """Every recipe for every target; only every so-manieth for targets behind the first."""
    return [
        (seed, recipe, target)
        for seed in seeds
        for number, recipe in enumerate(RECIPES)
        for target in TARGETS
        if target == TARGETS[0] or (seed + number) % wasm_every == 0
    ]


def run(trials: Sequence[Key]) -> Iterator[tuple[Key, str, str]]:
    """Trial, status and detail, in the order in which they are known."""
    for first in range(0, len(trials), BATCH * BATCHES):
        waiting = dict.fromkeys(trials[first : first + BATCH * BATCHES])
        while waiting:
            yield from _work(waiting)


def _work(waiting: dict[Key, None]) -> Iterator[tuple[Key, str, str]]:
    """One worker's life; what it judged leaves ``waiting``."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.random_graphs.worker"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None
    keys = list(waiting)
    for i in range(0, len(keys), BATCH):
        worker.stdin.write(json.dumps(keys[i : i + BATCH]) + "\n")
    worker.stdin.close()
    started = None
    for line in worker.stdout:
        if line.startswith("["):
            *key, status, detail = json.loads(line)
            started = (key[0], key[1], key[2])
            if status != "started":
                del waiting[started]
                yield started, status, detail
    if worker.wait() != 0:
        if started is None:
            raise RuntimeError(f"the worker ended with {worker.returncode} before any trial")
        if started in waiting:
            del waiting[started]
            yield started, "crashed", f"the process ended with {worker.returncode}"
        time.sleep(1)
