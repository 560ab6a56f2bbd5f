"""Number formats beside float32: size of the weights and latency, whole networks, one thread.

formats.py [--models mobilenet-v1,…] [--recipes w8a8,…] [--targets host,wasm-simd] [--runs 200]
formats.py --targets wasm-relaxed --runner browser

The bundles of a network take turns, a fraction of the inferences each; ratios below 1 say that the
format is faster than float32, by medians and by minima. For emulated ARM targets instructions
are counted instead, in millions. Weights are rounded to nearest and ranges taken
from a few synthetic inputs, which changes neither size nor latency (accuracy: accuracy_*.py).
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import instructions
from harness import (
    arguments,
    bundle_folder,
    chosen_models,
    chosen_targets,
    finish,
    head,
    progress,
)

from edgepipe import pipeline, runners
from edgepipe.benchmark import warmup_runs
from edgepipe.bundle import Bundle
from edgepipe.recipe import Recipe, Settings

HEADERS = [
    "model",
    "target",
    "recipe",
    "weights MB",
    "of fp32",
    "unit",
    "median",
    "min",
    "ratio to fp32",
    "of minima",
]
ROUNDS = 10


def main() -> int:
    options = arguments(
        __doc__,
        models="mobilenet-v1,ad_autoencoder",
        recipes="w8a8,w4a8,w8a16,w4g32,fp16",
        targets="host",
        runs="200",
        runner="",
    )
    head("Number formats beside float32, one thread")
    rows: list[list[str]] = []
    results: list[dict[str, object]] = []
    with bundle_folder(options.out) as folder:
        for target in chosen_targets(options.targets):
            for name, model in chosen_models(options.models).items():
                progress(f"compiling {name} for {target}")
                bundles = [
                    pipeline.compile(
                        model, target=target, recipe=plain(recipe),
                        output=folder / f"{name}-{target}-{recipe}",
                    )
                    for recipe in ("fp32", *options.recipes.split(","))
                ]  # fmt: skip
                compare(name, bundles, options.runs, options.runner or None, rows, results)
    finish(HEADERS, rows, results, options.json)
    return 0


def plain(line: str) -> Recipe:
    """The recipe with the cheapest fit and calibration."""
    recipe = Recipe.parse(line)
    if not recipe.quantizes:
        return recipe
    return replace(recipe, settings=Settings(methods=(), max_samples=4))


def compare(
    name: str, bundles: list[Bundle], runs: int, runner: str | None, rows: list[list[str]],
    results: list[dict[str, object]],
) -> None:  # fmt: skip
    """Measure the bundles of one network, the first being float32, and add a row for each."""
    counted = bundles[0].target.run.runners[0] == "qemu"
    unit = "M instructions" if counted else "ms"
    medians, minima = counts(bundles) if counted else in_turn(bundles, runs, runner)
    for bundle, median, least in zip(bundles, medians, minima, strict=True):
        size = [weight_bytes(b) for b in (bundle, bundles[0])]
        target, recipe = bundle.target.name, str(bundle.recipe)
        rows.append([
            name, target, recipe, f"{size[0] / 1e6:.2f}", f"{size[0] / size[1]:.3f}",
            unit, f"{median:.3f}", f"{least:.3f}", f"{median / medians[0]:.2f}",
            f"{least / minima[0]:.2f}",
        ])  # fmt: skip
        results.append({"model": name, "recipe": recipe, "target": target,
                        "weights_bytes": size[0], "unit": unit, "median": median,
                        "min": least})  # fmt: skip
        progress("  ".join(rows[-1]))


def in_turn(
    bundles: list[Bundle], runs: int, runner: str | None
) -> tuple[list[float], list[float]]:
    """Median over the rounds' medians and minimum, in ms, of each bundle."""
    executor = runners.pick(bundles[0].target, runner)
    rounds = min(ROUNDS, runs)
    warmup = warmup_runs(executor, runs // rounds)
    timings = [
        [executor.bench(bundle, runs // rounds, warmup) for bundle in bundles]
        for _ in range(rounds)
    ]
    each = list(zip(*timings, strict=True))
    return (
        [statistics.median(t.p50_ms for t in own) for own in each],
        [min(t.min_ms for t in own) for own in each],
    )


def counts(bundles: list[Bundle]) -> tuple[list[float], list[float]]:
    """Millions of instructions of each bundle, as medians and as minima: they repeat exactly."""
    found = [instructions.count(bundle) / 1e6 for bundle in bundles]
    return found, found


def weight_bytes(bundle: Bundle) -> int:
    """Size of everything constant: weights, scales, biases, tables."""
    return Path(bundle.file("weights.bin")).stat().st_size


if __name__ == "__main__":
    sys.exit(main())
