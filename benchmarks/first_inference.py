"""First inference in a browser: from code and weights in memory to the first result.

Every engine has a browser process and a page of its own each time, in turn, so nothing is warm;
median and minimum of ``--rounds``. Other engines' scripts are loaded beforehand, their WebAssembly
and the model are in memory as edgepipe's. Engines from npm come from the nearest node_modules.

  first_inference.py [--models mobilenet-v1,mobilenet-v2] [--rounds 7] [--json FILE]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from engines import recipe_file, tflite_file
from harness import arguments, bundle_folder, chosen_models, compile_apart, finish, head, progress

from edgepipe import peers
from edgepipe.bundle import Bundle
from edgepipe.errors import EdgepipeError
from edgepipe.runners import browser
from edgepipe.runners._base import Address

HEADERS = ["model", "format", "target", "engine", "median ms", "min ms"]


def firsts(
    name: str, model: str, recipe: str, target: str, folder: Path
) -> dict[str, Callable[[], float]]:
    """What measures each engine once, by its name. Raises EdgepipeError."""
    path = folder / f"{name}-{target}-{recipe}"
    compiled = compile_apart(
        model, target, path, "--recipe", recipe_file(folder, recipe), "--no-check"
    )
    if compiled.error:
        raise EdgepipeError(compiled.error)
    bundle, runner = Bundle.open(path), browser.at(Address())
    found: dict[str, Callable[[], float]] = {"edgepipe": lambda: runner.first_ms(bundle)}
    file = tflite_file(name, recipe)
    for wanted in (f"litert-js={file}" if file else "", "tfjs", "ort-web"):
        if not wanted or (wanted == "tfjs" and recipe != "fp32"):
            continue
        try:
            case = peers.Case(bundle, model, runner="browser")
            for engine in peers.engines(case, wanted, "browser"):
                if engine.first_ms is not None:
                    found[engine.name] = engine.first_ms
        except EdgepipeError as error:
            progress(str(error))
    return found


def main() -> int:
    options = arguments(__doc__, models="mobilenet-v1,mobilenet-v2", rounds="7")
    head("First inference in a browser", "apache-tvm")
    rows, results, failed = [], [], False
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for recipe, target in (("fp32", "wasm-simd"), ("fp32", "wasm-relaxed"),
                                   ("w8a8", "wasm-simd"), ("w8a8", "wasm-relaxed")):  # fmt: skip
                try:
                    engines = firsts(name, model, recipe, target, folder)
                    times: dict[str, list[float]] = {engine: [] for engine in engines}
                    for _ in range(options.rounds):
                        for engine, first_ms in engines.items():
                            times[engine].append(first_ms())
                except EdgepipeError as error:
                    failed = True
                    rows.append([name, recipe, target, str(error), "–", "–"])
                    continue
                for engine, ms in times.items():
                    middle, least = statistics.median(ms), min(ms)
                    rows.append([name, recipe, target, engine, f"{middle:.0f}", f"{least:.0f}"])
                    progress("  ".join(rows[-1]))
                    results.append({"model": name, "recipe": recipe, "target": target,
                                    "engine": engine, "first_ms": ms})  # fmt: skip
    finish(HEADERS, rows, results, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
