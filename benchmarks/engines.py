"""Latency beside the engines people use now, in turn, one thread each: native, Node, browser.

engines.py [--models mobilenet-v1,mobilenet-v2] [--places all] [--runs 200] [--json FILE]

Places: host, browser (Chromium) and node, each in float32 and w8a8. Engines from npm are taken
from the nearest node_modules above the working folder; .tflite files of the same architecture
from ``peers`` beside the shared models (EDGEPIPE_SHARED), else those that quantized bundles have.
What is not there is said and left out.
Weights are He-initialised: for latency only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from harness import (
    SHARED,
    arguments,
    bundle_folder,
    chosen_models,
    compile_apart,
    finish,
    head,
    progress,
)

from edgepipe.benchmark import Benchmark, bench
from edgepipe.bundle import Bundle
from edgepipe.errors import EdgepipeError

HEADERS = ["model", "place", "format", "ratio to the best", "edgepipe ms", "min", "engines ms"]
#: ``{}`` is the .tflite file of the model in that format.
LITERT, LITERT_JS = "litert={}", "litert-js={}"


@dataclass(frozen=True)
class Place:
    """Where a bundle for ``target`` runs, and the engines that run there too."""

    name: str
    target: str
    runner: str
    recipe: str
    engines: tuple[str, ...]


PLACES = [
    Place("host", "host", "local", "fp32", (LITERT, "ort", "openvino", "ncnn")),
    Place("host", "host", "local", "w8a8", (LITERT, "ort", "openvino")),
    Place("browser", "wasm-simd", "browser", "fp32", (LITERT_JS, "tfjs", "ort-web")),
    Place("browser", "wasm-relaxed", "browser", "fp32", (LITERT_JS, "tfjs", "ort-web")),
    Place("browser", "wasm-simd", "browser", "w8a8", (LITERT_JS, "ort-web")),
    Place("browser", "wasm-relaxed", "browser", "w8a8", (LITERT_JS, "ort-web")),
    Place("node", "wasm-simd", "node", "fp32", ("ort-web", "tfjs")),
    Place("node", "wasm-simd", "node", "w8a8", ("ort-web",)),
]


def recipe_file(folder: Path, recipe: str) -> str:
    """Latency does not ask for accuracy: no methods, few samples."""
    if recipe == "fp32":
        return "fp32"
    file = folder / f"{recipe}.toml"
    file.write_text(f'format = "{recipe}"\nmethods = []\nmax_samples = 4\n', encoding="utf-8")
    return str(file)


def tflite_file(name: str, recipe: str) -> Path | None:
    suffix = "f32" if recipe == "fp32" else "i8"
    file = SHARED / "peers" / f"{name.replace('-', '_')}_{suffix}.tflite"
    return file if file.is_file() else None


def built(name: str, model: str, target: str, recipe: str, folder: Path) -> Bundle:
    """The bundle in ``folder``, compiled where it is not there yet. In integers with its Q/DQ
    model, and with a .tflite where none lies beside and it has that form. Raises EdgepipeError."""
    path = folder / f"{name}-{target}-{recipe}"
    if path.exists():
        return Bundle.open(path)
    words = ["--recipe", recipe_file(folder, recipe), "--no-check"]
    if recipe != "fp32":
        words += ["--emit", "onnx"]
    more = [] if recipe == "fp32" or tflite_file(name, recipe) else ["--emit", "tflite"]
    compiled = compile_apart(model, target, path, *words, *more)
    if "has no tflite form" in compiled.error:
        progress(f"{name}: {compiled.error}")
        compiled = compile_apart(model, target, path, *words)
    if compiled.error:
        raise EdgepipeError(compiled.error)
    return Bundle.open(path)


def measure(name: str, model: str, place: Place, folder: Path, runs: int) -> Benchmark:
    """Compile and measure. Raises EdgepipeError."""
    file = tflite_file(name, place.recipe)
    bundle = built(name, model, place.target, place.recipe, folder)
    engines = [e.format(file) if file else e.partition("=")[0] for e in place.engines]
    if file is None and "model.tflite" not in bundle.manifest["files"]:
        engines = [e for e in engines if not e.startswith("litert")]
    missing: list[str] = []
    result = bench(bundle, runner=place.runner, against=engines, runs=runs, model=model,
                   missing=missing)  # fmt: skip
    for reason in missing:
        progress(f"{name} {place.name}: {reason}")
    return result


def main() -> int:
    options = arguments(__doc__, models="mobilenet-v1,mobilenet-v2", places="all", runs="200")
    head("Latency beside other engines, one thread each", "ai-edge-litert", "openvino", "ncnn")
    print("ratio: median over the fastest engine's in the same run; below 1 edgepipe is faster\n")
    rows, results, failed = [], [], False
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for place in PLACES:
                if options.places not in ("all", place.name):
                    continue
                row = [name, f"{place.name}, {place.target}", place.recipe]
                try:
                    result = measure(name, model, place, folder, options.runs)
                except EdgepipeError as error:
                    failed = True
                    rows.append([*row, "–", "–", "–", str(error)])
                    continue
                best = min((p.median_ms for p in result.peers), default=None)
                ratio = f"{result.ours.median_ms / best:.2f}" if best else "–"
                peers = "; ".join(f"{p.engine} {p.median_ms:.2f}" for p in result.peers)
                rows.append([*row, ratio, f"{result.ours.median_ms:.2f}",
                             f"{result.ours.min_ms:.2f}", peers])  # fmt: skip
                results.append({"model": name, "place": place.name, **result.to_json()})
                progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
