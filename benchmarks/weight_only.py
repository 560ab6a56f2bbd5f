"""Weights in 8 or 4 bits or in half precision, arithmetic in float32: size and latency beside fp32.

weight_only.py [--models mobilenet-v1,…] [--recipes w8a16,…] [--target host] [--runs 200]

The bundles of a network take turns, a fraction of the inferences each; the ratio is taken from
medians. Weights are fitted to synthetic inputs, which changes neither size nor latency.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from harness import arguments, bundle_folder, chosen_models, finish, head, progress

from edgepipe import pipeline, runners
from edgepipe.bundle import Bundle

HEADERS = ["model", "recipe", "weights MB", "of fp32", "median ms", "min", "ratio to fp32"]
ROUNDS = 10


def main() -> int:
    options = arguments(
        __doc__,
        models="mobilenet-v1,ad_autoencoder",
        recipes="w8a16,w4g32,fp16",
        target="host",
        runs="200",
    )
    head("Weight-only formats beside float32, one thread")
    rows, results = [], []
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            progress(f"compiling {name}")
            bundles = [
                pipeline.compile(
                    model, target=options.target, recipe=recipe, output=folder / f"{name}-{recipe}"
                )
                for recipe in ("fp32", *options.recipes.split(","))
            ]
            medians, minima = in_turn(bundles, options.runs)
            for bundle, median, least in zip(bundles, medians, minima, strict=True):
                size = [weight_bytes(b) for b in (bundle, bundles[0])]
                recipe = str(bundle.recipe)
                rows.append([
                    name, recipe, f"{size[0] / 1e6:.2f}", f"{size[0] / size[1]:.3f}",
                    f"{median:.3f}", f"{least:.3f}", f"{median / medians[0]:.2f}",
                ])  # fmt: skip
                results.append({"model": name, "recipe": recipe, "target": options.target,
                                "weights_bytes": size[0], "median_ms": median,
                                "min_ms": least})  # fmt: skip
                progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 0


def in_turn(bundles: list[Bundle], runs: int) -> tuple[list[float], list[float]]:
    """Median over the rounds' medians and minimum, in ms, of each bundle."""
    executor = runners.pick(bundles[0].target)
    rounds = min(ROUNDS, runs)
    timings = [
        [executor.bench(bundle, runs // rounds, max(3, runs // rounds // 4)) for bundle in bundles]
        for _ in range(rounds)
    ]
    each = list(zip(*timings, strict=True))
    return (
        [statistics.median(t.p50_ms for t in own) for own in each],
        [min(t.min_ms for t in own) for own in each],
    )


def weight_bytes(bundle: Bundle) -> int:
    """Size of everything constant: weights, scales, biases, tables."""
    return Path(bundle.file("weights.bin")).stat().st_size


if __name__ == "__main__":
    sys.exit(main())
