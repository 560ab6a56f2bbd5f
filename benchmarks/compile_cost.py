"""What compiling costs: seconds and peak memory of ``edgepipe compile``, warm caches.

Every pair is compiled ``--repeats`` times in a process of its own after one that warms the caches
(zig's C library, exported zoo networks); median seconds and largest memory are printed.

  compile_cost.py [--models mobilenet-v1,…] [--targets all|A,B] [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from harness import (
    arguments,
    bundle_folder,
    chosen_models,
    chosen_targets,
    compile_apart,
    finish,
    head,
    progress,
)

HEADERS = ["model", "target", "median s", "slowest s", "peak MB", "longest stages"]


def help_seconds() -> float:
    """Fastest of five ``edgepipe --help``, process start included."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, "-m", "edgepipe", "--help"]
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> int:
    options = arguments(__doc__, models="mobilenet-v1", targets="all", repeats="3")
    head("Cost of compiling", "apache-tvm", "ziglang")
    rows, results, failed = [], [], False
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for target in chosen_targets(options.targets):
                path = folder / f"{name}-{target}"
                runs = [compile_apart(model, target, path) for _ in range(options.repeats + 1)][1:]
                if runs[-1].error:
                    failed = True
                    rows.append([name, target, "–", "–", "–", runs[-1].error])
                    continue
                seconds = [run.seconds for run in runs]
                peak = max(run.peak_bytes for run in runs)
                stages = sorted(runs[-1].stages, key=lambda s: -s["seconds"])[:3]
                longest = ", ".join(f"{s['stage']} {s['seconds']:.1f}" for s in stages)
                middle = statistics.median(seconds)
                rows.append(
                    [
                        name,
                        target,
                        f"{middle:.1f}",
                        f"{max(seconds):.1f}",
                        f"{peak / 1e6:.0f}",
                        longest,
                    ]
                )
                results.append(
                    {"model": name, "target": target, "seconds": seconds, "peak_bytes": peak}
                )
                progress("  ".join(map(str, rows[-1])))
    print(f"edgepipe --help: {help_seconds():.2f} s (fastest of 5)\n")
    finish(HEADERS, rows, results, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
