"""Fuzz: ``python -m tests.fuzz.run [--inputs 20000] [--seed N] [--kind onnx …] [--only INDEX]``.

An input is made from (seed, kind, index) alone, so what is printed of a finding makes it again.
Damage follows the structure of each format and is made blindly: what coverage would add is had
by starting from many sound files (``--wide``: the onnx package's own cases too). A worker that
dies is a finding, as is one that takes ten seconds of CPU time or gives no sign for a minute.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
#: Seconds by the clock after which a worker is given up, whatever it does.
GIVE_UP_S = 60.0
_START_S = 180.0


@dataclass
class Tally:
    """Of one kind: how many inputs, by exit code; CPU seconds of the slowest; findings as (index,
    problems)."""

    codes: collections.Counter[int] = field(default_factory=collections.Counter)
    slowest: float = 0.0
    findings: list[tuple[int, list[str]]] = field(default_factory=list)
    answers: collections.Counter[str] = field(default_factory=collections.Counter)


class Worker:
    """One process that works off inputs; started anew after one that killed it."""

    def __init__(self, kind: str, seed: str, folder: Path, wide: bool) -> None:
        self.folder = folder
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.worker",
            kind,
            seed,
            str(folder),
            str(int(wide)),
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.log = (folder / "log").open("wb")
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=self.log)  # fmt: skip
        self.fresh = True
        self.pending = b""

    def ask(self, index: int) -> dict[str, Any]:
        """The result for one input. One without ``code`` says how the worker came to its end."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{index}\n".encode())
        self.process.stdin.flush()
        started = self._line(_START_S if self.fresh else 60.0)
        self.fresh = False
        result = self._line(GIVE_UP_S) if started and "start" in started else None
        if result is not None:
            return result
        code = self.process.poll()
        if code is None:
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
            self.close()
            stack = (self.folder / "stack").read_text(encoding="utf-8", errors="replace")
            return {"problems": [f"no end within {GIVE_UP_S:g} s: {stack[:1500]}"]}
        log = (self.folder / "log").read_text(encoding="utf-8", errors="replace")
        said = (self.folder / "stderr").read_text(encoding="utf-8", errors="replace")
        return {"problems": [f"the process ended with {code}: {said[-600:]} {log[-800:]}"]}

    def _line(self, timeout_s: float) -> dict[str, Any] | None:
        """The next line; None where the time is over, or the process."""
        assert self.process.stdout is not None
        end = time.monotonic() + timeout_s
        while b"\n" not in self.pending:
            left = max(0.0, end - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            if not (got := os.read(self.process.stdout.fileno(), 65536)):
                self.process.wait(10)
                return None
            self.pending += got
        line, _, self.pending = self.pending.partition(b"\n")
        parsed: dict[str, Any] = json.loads(line)
        return parsed

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


def fuzz(
    kind: str, seed: str, indices: list[int], *, wide: bool = False, verbose: bool = False
) -> Tally:
    """Work off the inputs ``indices`` of one kind."""
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="edgepipe-fuzz-") as name:
        worker = Worker(kind, seed, Path(name), wide)
        for index in indices:
            result = worker.ask(index)
            if "code" not in result:
                worker.close()
                worker = Worker(kind, seed, Path(name), wide)
            _count(tally, index, result)
            if result["problems"]:
                print(f"finding: --kind {kind} --seed {seed} --only {index}: "
                      f"{' | '.join(result['problems'])[:1800]}", flush=True)  # fmt: skip
            if verbose:
                print(json.dumps(result, indent=1))
        worker.close()
    return tally


def _count(tally: Tally, index: int, result: dict[str, Any]) -> None:
    if result["problems"]:
        tally.findings.append((index, result["problems"]))
    if "code" in result:
        tally.codes[result["code"]] += 1
        tally.slowest = max(tally.slowest, result["cpu_s"])
        tally.answers[" ".join(result["said"].split()[:6])] += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20000, help="in all; kinds have shares")
    parser.add_argument("--seed", default=str(int(time.time())))
    parser.add_argument("--kind", action="append", choices=sorted(KINDS))
    parser.add_argument("--only", type=int, help="this input alone, with all that it says")
    parser.add_argument("--wide", action="store_true", help="start from onnx's own cases too")
    options = parser.parse_args()
    chosen = options.kind or list(KINDS)
    share = sum(KINDS[kind][1] for kind in chosen)
    print(f"seed {options.seed}, {options.inputs} inputs, wide: {options.wide}", flush=True)
    total, findings = 0, 0
    for kind in chosen:
        count = round(options.inputs * KINDS[kind][1] / share)
        indices = list(range(count)) if options.only is None else [options.only]
        start = time.perf_counter()
        tally = fuzz(kind, options.seed, indices, wide=options.wide,
                     verbose=options.only is not None)  # fmt: skip
        total += len(indices)
        findings += len(tally.findings)
        codes = ", ".join(f"{n} x exit {code}" for code, n in sorted(tally.codes.items()))
        print(f"{kind}: {len(indices)} inputs, {len(tally.findings)} findings; {codes}; slowest "
              f"{tally.slowest:.1f} s; {len(tally.answers)} different answers; "
              f"{time.perf_counter() - start:.0f} s in all", flush=True)  # fmt: skip
    print(f"{total} inputs, {findings} findings, seed {options.seed}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
