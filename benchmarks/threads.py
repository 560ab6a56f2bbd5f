"""Threads: how much faster several are than one, and how evenly they share the work.

threads.py [--models mobilenet-v1] [--recipes fp32,w8a8] [--threads 2] [--runs 200] [--json FILE]

Times are of one run in which one thread and several take turns. A machine that others use at the
same time, or with fewer free cores than threads, gives no figure: the load is printed with it. Two
estimates do not depend on that. Each part is run by itself: the CPU time of the longest part of
every stretch between two meetings, added up, is what threads would take that never wait for one
another's caches. And QEMU counts a Raspberry Pi 4's instructions, of all and of the longest part.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import instructions
from harness import arguments, bundle_folder, chosen_models, compile_apart, finish, head, progress

from edgepipe.benchmark import in_turn
from edgepipe.bundle import Bundle
from edgepipe.codegen import link
from edgepipe.errors import UserError

HEADERS = ["model", "recipe", "threads", "faster, medians", "faster, minima", "1 thread ms",
           "threads ms", "estimate, CPU time", "estimate, instructions"]  # fmt: skip
#: Repetitions of a part, of which the fastest of every stretch counts.
REPETITIONS = 60


def program(bundle: Bundle, folder: Path) -> Path:
    """``parts.c`` with the bundle's model."""
    source = Path(__file__).with_name("parts.c")
    files = [str(source), str(bundle.file("model.a"))]
    link.zig("cc", "-target", bundle.target.link.static_zig_target, "-static", "-O2", "-g0",
             "-fno-sanitize=all", f"-I{bundle.path}", *files, "-o", "parts",
             cwd=folder)  # fmt: skip
    return folder / "parts"


def cpu_time_speedup(bundle: Bundle, threads: int) -> float:
    """CPU time of one part of one over that of the longest parts, stretch by stretch."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-bench-") as name:
        parts = program(bundle, Path(name))
        weights = str(bundle.file("weights.bin"))

        def stretches(part: int, count: int) -> list[float]:
            words = [str(parts), str(REPETITIONS), str(part), str(count), weights]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            return [float(line) for line in done.stdout.split()]

        shares = [stretches(part, threads) for part in range(threads)]
        longest = sum(max(step) for step in zip(*shares, strict=True))
        return sum(stretches(0, 1)) / longest


def instruction_speedup(bundle: Bundle, threads: int) -> float:
    """Instructions of an inference over those of the longest part. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="edgepipe-bench-") as name:
        parts = str(program(bundle, Path(name)))
        weights = str(bundle.file("weights.bin"))

        def count(part: int, of: int) -> float:
            return instructions.between(
                bundle.target, lambda n: [parts, str(n), str(part), str(of), weights]
            )

        return count(0, 1) / max(count(part, threads) for part in range(threads))


def measured(model: str, recipe: str, threads: int, runs: int, folder: Path) -> dict[str, Any]:
    """Everything of one network in one format. Raises UserError."""
    bundles = {}
    for target in ("host", "raspberry-pi-4"):
        options = ("--recipe", recipe, "--threads", str(threads))
        compiled = compile_apart(model, target, folder / f"{target}-{recipe}", *options)
        if compiled.error:
            raise UserError(compiled.error, where=f"{model} for {target}")
        bundles[target] = Bundle.open(compiled.path)
    host = bundles["host"]
    before = os.getloadavg()[0]
    one, several = in_turn([host.with_threads(1), host.with_threads(threads)], runs=runs)
    result = {
        "recipe": recipe, "threads": threads, "load_before": before, "load": os.getloadavg()[0],
        "faster_p50": one.p50_ms / several.p50_ms, "faster_min": one.min_ms / several.min_ms,
        "one_p50_ms": one.p50_ms, "several_p50_ms": several.p50_ms,
        "estimate_cpu_time": cpu_time_speedup(host, threads), "estimate_instructions": None,
    }  # fmt: skip
    try:
        counted = instruction_speedup(bundles["raspberry-pi-4"], threads)
        result["estimate_instructions"] = counted
    except UserError as error:
        progress(str(error))
    return result


def main() -> int:
    options = arguments(__doc__, models="mobilenet-v1", recipes="fp32,w8a8", threads="2",
                        runs="200")  # fmt: skip
    head("Threads that share an inference")
    rows, results = [], []
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for recipe in options.recipes.split(","):
                found = measured(model, recipe, options.threads, options.runs, folder / name)
                results.append({"model": name, **found})
                counted = found["estimate_instructions"]
                rows.append([
                    name, recipe, str(options.threads), f"{found['faster_p50']:.2f}",
                    f"{found['faster_min']:.2f}", f"{found['one_p50_ms']:.3f}",
                    f"{found['several_p50_ms']:.3f}", f"{found['estimate_cpu_time']:.2f}",
                    "–" if counted is None else f"{counted:.2f}",
                ])  # fmt: skip
                load = f"{found['load_before']:.1f} before, {found['load']:.1f} after"
                progress("  ".join(rows[-1]))
                print(f"{name} {recipe}: load average {load}, {os.cpu_count()} cores  ", flush=True)
    print()
    finish(HEADERS, rows, results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
