"""Boards behind TVM's RPC servers; those that a tracker has for a key all measure at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.runner import RunnerInput

from edgepipe.errors import EdgepipeError
from edgepipe.runners import rpc
from edgepipe.tuning.meters import Meter

#: Rounds, and the time of one kernel in one, ms: a call takes a millisecond by itself.
ROUNDS, ROUND_MS = 15, 3


#: What ``fill`` of a candidate for a GPU answers (candidate_gpu.c), and that launches failed.
GPU_ERRORS = (
    "", "the board has no NVIDIA driver", "its GPU has another sm than the target's",
    "its driver does not take the kernels", "its GPU has no memory left", "a kernel failed",
)  # fmt: skip
FAILED = len(GPU_ERRORS) - 1


def _check(status: int) -> None:
    if status:
        raise EdgepipeError(GPU_ERRORS[min(int(status), FAILED)])


@derived_object
class Boards(Meter):
    """One board, or as many as a tracker has for a key. ``times``: kernels of a measured call."""

    form = "LIBRARY"

    def __init__(self, server: rpc.Server, times: int = 1) -> None:
        super().__init__()
        self.server, self.times = server, times
        self.boards = server.count()
        self.pool = ThreadPoolExecutor(self.boards)
        self.measured_on = server.NAME

    def run(self, runner_inputs: Sequence[RunnerInput]) -> list[Any]:
        """All boards take candidates, each when it has none."""
        paths = (str(given.artifact_path) for given in runner_inputs)
        return list(self.pool.map(self._attempt, paths))

    def measure(self, path: str) -> list[float]:
        """Seconds, by the board's own clock. Both kernels are measured on one board."""

        def work() -> list[float]:
            with self.server.library(Path(path)) as (module, device):
                _check(module["fill"]())
                timers = [
                    module.time_evaluator(f"run_{i}", device, number=1, min_repeat_ms=ROUND_MS)
                    for i in range(2)
                ]
                turns = itertools.chain.from_iterable(timers for _ in range(ROUNDS))
                values = [float(timer().results[0]) / self.times for timer in turns]
                _check(FAILED * int(module["run_1"]() != 0))
                return values

        try:
            return self.server.within(work)
        except EdgepipeError:
            raise
        except Exception as error:  # whatever TVM raises across the connection
            raise EdgepipeError(f"{self.server.NAME}: {error}") from None

    def close(self) -> None:
        """End the threads."""
        with contextlib.suppress(RuntimeError):
            self.pool.shutdown(wait=False, cancel_futures=True)
