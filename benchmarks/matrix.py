"""Every model × every target: does it compile, is it right, how large is it, what did it take.

Right means: against ONNX Runtime through the target's runners, by the rule of edgepipe.validation
(at least 100 dB, or no more than 6 dB further from float64 than ONNX Runtime is). Exit code 1
where anything failed.

  matrix.py [--models all|zoo|shared|A,B] [--targets all|A,B] [--recipe R] [--runs 2] [--json FILE]

A quantized recipe is judged by its Q/DQ model, in steps of its codes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

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

from edgepipe import runners
from edgepipe.bundle import Bundle
from edgepipe.data import synthetic
from edgepipe.display import db_text
from edgepipe.errors import EdgepipeError
from edgepipe.validation import validate

HEADERS = [
    "model",
    "target",
    "compile s",
    "peak MB",
    "code KB",
    "weights MB",
    "arena MB",
    "arena / live",
    "SNR dB",
    "verdict",
]


def measure(
    name: str, model: str, target: str, recipe: str, path: Path, runs: int
) -> dict[str, Any]:
    """Compile and validate one pair."""
    compiled = compile_apart(model, target, path, "--recipe", recipe)
    result: dict[str, Any] = {
        "model": name,
        "target": target,
        "recipe": recipe,
        "seconds": round(compiled.seconds, 2),
        "peak_bytes": compiled.peak_bytes,
    }
    if compiled.error:
        return {**result, "ok": False, "error": compiled.error}
    bundle = Bundle.open(path)
    files, memory = bundle.manifest["files"], bundle.manifest["memory"]
    code = "model.wasm" if "model.wasm" in files else "model.so"
    live = max(memory["peak_live_bytes"], 1)
    result |= {
        "code_bytes": files[code]["bytes"],
        "weights_bytes": memory["weights_bytes"],
        "arena_bytes": memory["arena_bytes"],
        "arena_over_live": round(memory["arena_bytes"] / live, 4),
        "runners": {},
    }
    for runner in runners.candidates(bundle.target):
        if not runners.get(runner).available(bundle.target).ok:
            continue
        result["runners"][runner] = judged(bundle, runner, model, runs)
    checked = result["runners"].values()
    return {**result, "ok": bool(checked) and all(item["ok"] for item in checked)}


def judged(bundle: Bundle, runner: str, model: str, runs: int) -> dict[str, Any]:
    """The validation through one runner, in short."""
    try:
        samples = synthetic(bundle.inputs, runs=runs)
        report = validate(bundle, samples, runner=runner, model=model)
    except EdgepipeError as error:
        return {"ok": False, "snr_db": "–", "failures": [str(error)]}
    snr64 = [o.snr64_db for o in report.outputs if o.snr64_db is not None]
    reference64 = [o.reference_snr64_db for o in report.outputs if o.reference_snr64_db is not None]
    short = {"ok": report.ok, "snr_db": db_text(min(o.snr_db for o in report.outputs))}
    if snr64 and reference64:
        short["snr64_db"] = f"{db_text(min(snr64))}, ORT {db_text(min(reference64))}"
    return {**short, "failures": list(report.failures)}


def row(result: dict[str, Any]) -> list[Any]:
    """The table's line."""
    start = [
        result["model"],
        result["target"],
        f"{result['seconds']:.1f}",
        f"{result['peak_bytes'] / 1e6:.0f}",
    ]
    if "error" in result:
        return [*start, *["–"] * 5, result["error"]]
    snr = "; ".join(
        f"{name} {item['snr_db']}" + (f" (f64: {item['snr64_db']})" if "snr64_db" in item else "")
        for name, item in result["runners"].items()
    )
    failures = [text for item in result["runners"].values() for text in item["failures"]]
    return [
        *start,
        f"{result['code_bytes'] / 1024:.1f}",
        f"{result['weights_bytes'] / 1e6:.2f}",
        f"{result['arena_bytes'] / 1e6:.2f}",
        f"{result['arena_over_live']:.3f}",
        snr or "no runner here",
        "ok" if result["ok"] else "; ".join(failures) or "NOT RUN",
    ]


def main() -> int:
    options = arguments(__doc__, models="all", targets="all", recipe="fp32", runs="2")
    head(f"Models × targets, {options.recipe}", "apache-tvm", "ziglang", "wasmtime")
    results = []
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for target in chosen_targets(options.targets):
                path = folder / f"{name}-{target}"
                result = measure(name, model, target, options.recipe, path, options.runs)
                results.append(result)
                progress("  ".join(map(str, row(result))))
    finish(HEADERS, list(map(row, results)), results, options.json)
    failed = [r for r in results if not r["ok"]]
    print(f"\n{len(results) - len(failed)} of {len(results)} ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
