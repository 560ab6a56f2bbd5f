"""Sparse against dense: random masks on all pointwise convolutions of MobileNetV1-224, in turn.

sparse_latency.py [--targets host,wasm-simd] [--patterns 80%,90%,2:4v32,1:4v32] [--runs 60]
sparse_latency.py --patterns w8a8,w8a8+80%b1x4,w8a8+90%b1x4

Patterns are of float32; what names a format is a whole recipe, whose weights are pruned by size and
rounded as they are: what codes are does not change how long kernels take.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
from harness import arguments, bundle_folder, chosen_targets, finish, head, progress

import edgepipe
from edgepipe import importer, passes
from edgepipe.benchmark import bench
from edgepipe.bundle import Bundle
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.sparsity.pattern import Pattern
from edgepipe.sparsity.pruning import mask
from edgepipe.target import Target

ROUNDS = 3


def masked(text: str, path: Path) -> Path:
    """MobileNetV1 with He weights, its pointwise ones masked at random and scaled up again."""
    source = importer.load("mobilenet-v1")
    model = passes.run(source.model, Context(Target.load("x86-64-v3"), Recipe()))
    rng = np.random.default_rng(0)
    for node in model.graph:
        value = node.inputs[1] if node.op_type == "Conv" else None
        weight = value.const_value.numpy() if value is not None and value.const_value else None
        if value is None or weight is None or weight.shape[2:] != (1, 1) or text == "dense":
            continue
        pattern = Pattern.parse(text, "--patterns")
        kept = mask(rng.random((*weight.shape[:2], 1)), pattern)[..., None]
        value.const_value = ir.tensor(
            (weight * kept / np.sqrt(kept.mean())).astype(np.float32), name=value.name
        )
    ir.save(model, path)
    return path


def compiled(name: str, target: str, folder: Path) -> Bundle:
    """MobileNetV1 with the weights of a pattern, or by a recipe."""
    number = len(list(folder.iterdir()))
    if not name.startswith("w"):
        path = masked(name, folder / f"{number}.onnx")
        return edgepipe.compile(path, target=target, output=folder / f"{target}-{number}")
    recipe = Recipe.read(name, {"methods": [], "max_samples": 8})
    return edgepipe.compile(
        "mobilenet-v1", target=target, recipe=recipe, output=folder / f"{target}-{number}"
    )


def main() -> int:
    options = arguments(
        __doc__, targets="host,wasm-simd", patterns="80%,90%,2:4v32,1:4v32", runs="60"
    )
    head("Sparse pointwise convolutions of MobileNetV1-224, one thread")
    print(f"ratio: smallest latency of {ROUNDS} rounds over the dense network's, in turn\n")
    rows, results = [], []
    with bundle_folder(options.out) as folder:
        names = ["dense", *options.patterns.split(",")]
        for target in chosen_targets(options.targets):
            progress(target)
            bundles = {n: compiled(n, target, folder) for n in names}
            best = dict.fromkeys(names, np.inf)
            for _ in range(ROUNDS):
                for name, bundle in bundles.items():
                    best[name] = min(best[name], bench(bundle, runs=options.runs).ours.min_ms)
            for name, bundle in bundles.items():
                size = bundle.manifest["memory"]["weights_bytes"]
                ratio = best[name] / best["dense"]
                rows.append(
                    [target, name, f"{ratio:.2f}", f"{best[name]:.2f}", f"{size / 1e6:.1f}"]
                )
                results.append({"target": target, "pattern": name, "min_ms": best[name]})
    finish(["target", "pattern", "ratio", "min ms", "weights MB"], rows, results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
