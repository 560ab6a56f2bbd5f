"""The demonstration behind ``make demo``: one trained network on three kinds of target.

Compiles the handwritten-digit network for this machine, for WebAssembly and for a Raspberry Pi 4,
in float32 and in 8-bit integers, runs each bundle on 450 labelled images it was not trained on,
compares with ONNX Runtime, and prints one table. Needs no torch. Exit code 1 where a bundle is
wrong or cannot be run.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import edgepipe
from edgepipe.display import Progress, db_text, size_text, table
from edgepipe.machine import machine, one_line, versions

OUT = Path("out")
TARGETS = ("host", "wasm-simd", "raspberry-pi-4")
#: Recipe, what it is calibrated with, and the points of accuracy it may cost.
RECIPES = (("fp32", None, 0.0), ("w8a8", "digits-train", 0.5))
HEADERS = [
    "target",
    "recipe",
    "runner",
    "compiled in",
    "code",
    "weights",
    "arena",
    "accuracy",
    "ONNX Runtime",
    "SNR dB",
    "latency",
    "verdict",
]


def row(target: str, recipe: str, calibration: str | None, drop: float) -> list[str]:
    """Compile, validate and measure ``digits`` for ``target``."""
    name = f"digits-{target}-{recipe}"
    options = f" --recipe {recipe} --calibration {calibration}" if calibration else ""
    print(f"\n$ edgepipe compile digits --target {target}{options} -o out/{name}", flush=True)
    start = time.perf_counter()
    # The first link for a target compiles a C library, which takes a minute.
    progress = Progress()
    bundle = edgepipe.compile(
        "digits",
        target=target,
        recipe=recipe,
        calibration=calibration,
        output=OUT / name,
        progress=progress,
    )
    progress.finish()
    seconds = time.perf_counter() - start
    files = bundle.manifest["files"]
    code = "model.wasm" if "model.wasm" in files else "model.so"
    built = [
        f"{seconds:.1f} s",
        size_text(files[code]["bytes"]),
        size_text(files["weights.bin"]["bytes"]),
        size_text(bundle.manifest["memory"]["arena_bytes"]),
    ]
    print(f"$ edgepipe validate out/{name} --data digits", flush=True)
    try:
        report = bundle.validate(data="digits", max_top1_drop=drop)
    except edgepipe.UserError as error:
        print(f"  {error}")
        return [target, recipe, "none here", *built, "–", "–", "–", "–", "NOT RUN"]
    print(report)
    timing = bundle.bench(runs=100)
    ratios = "".join(f", {ratio:.2f} × ORT" for ratio in timing.ratios.values())
    latency = "(emulated)" if timing.ours.emulated else f"{timing.ours.median_ms:.3f} ms{ratios}"
    return [
        target,
        recipe,
        report.runner,
        *built,
        f"{100 * (report.accuracy or 0):.2f} %",
        f"{100 * (report.reference_accuracy or 0):.2f} %",
        db_text(min(output.snr_db for output in report.outputs)),
        latency,
        "ok" if report.ok else "FAILED",
    ]


def main() -> int:
    """Print the table."""
    if platform.machine() not in ("x86_64", "AMD64"):
        print("the target 'host' is x86-64 for now; it is left out")
    targets = TARGETS if platform.machine() in ("x86_64", "AMD64") else TARGETS[1:]
    rows = [row(target, *recipe) for target in targets for recipe in RECIPES]
    print(f"\n{table(HEADERS, rows)}\n")
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "apache-tvm", "ziglang")))
    print(f"bundles: {OUT}/digits-*; look at manifest.json, model.h, example.c, model.mjs")
    return 0 if all(cells[-1] == "ok" for cells in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
