"""Run edge-core cases in worker processes, so that a crash is a result and not the end.

``python -m tests.onnx_conformance.run [PATTERN …]`` prints a summary;
``--write`` commits it to ``status.json``.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STATUS = Path(__file__).with_name("status.json")


def run(names: list[str], progress: bool = False) -> dict[str, list[str]]:
    """Result per case: [status, detail]; status is passed, refused, wrong or crashed."""
    results: dict[str, list[str]] = {}
    while remaining := [n for n in names if n not in results]:
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.onnx_conformance.worker"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if progress else subprocess.DEVNULL,
            text=True,
        )
        started = _collect(worker, remaining, results, progress)
        if worker.returncode != 0:
            if started is None:
                raise RuntimeError(f"the worker ended with {worker.returncode} before any case")
            results[started] = ["crashed", f"the process ended with {worker.returncode}"]
    return results


def _collect(
    worker: subprocess.Popen[str], names: list[str], results: dict[str, list[str]], progress: bool
) -> str | None:
    """Send all names and collect answers; returns the case that was under way at the end."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("\n".join(names) + "\n")
    worker.stdin.close()
    started = None
    for line in worker.stdout:
        if not line.startswith("{"):
            continue
        answer: dict[str, Any] = json.loads(line)
        if answer["status"] == "started":
            started = answer["name"]
            continue
        results[answer["name"]] = [answer["status"], answer["detail"]]
        if progress and len(results) % 100 == 0:
            print(len(results), file=sys.stderr)
    worker.wait()
    return started


def main() -> None:
    """Command line, see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    from tests.onnx_conformance.cases import edge_core

    names = [
        n
        for n in edge_core()
        if not arguments.patterns or any(re.search(p, n) for p in arguments.patterns)
    ]
    started = time.monotonic()
    results = run(names, progress=True)
    for name, (status, detail) in sorted(results.items(), key=lambda r: (r[1][0], r[1][1])):
        if status != "passed":
            print(f"{status:8} {name}: {detail}")
    counts = collections.Counter(status for status, _ in results.values())
    print(dict(counts), f"{time.monotonic() - started:.0f} s")
    if arguments.write:
        write(results)


def write(results: dict[str, list[str]]) -> None:
    """Commit the statuses, sorted, one case per line; cases not run keep theirs."""
    from tests.onnx_conformance.cases import edge_core

    known = json.loads(STATUS.read_text(encoding="utf-8")) if STATUS.is_file() else {}
    known |= {name: status for name, (status, _) in results.items()}
    names = sorted(set(known) & set(edge_core()))
    lines = (f"  {json.dumps(n)}: {json.dumps(known[n])}" for n in names)
    STATUS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
