"""Sparse beside dense and beside other engines, in turn: random masks on all pointwise convolutions
of MobileNetV1-224, one thread.

sparse_latency.py [--places host,node,browser] [--patterns 80%,90%,2:4v32,1:4v32] [--runs 60]
sparse_latency.py --places browser --patterns w8a8,w8a8+80%b1x4,w8a8+90%b1x4

Patterns are of float32; what names a format is a whole recipe, whose weights are pruned by size and
rounded as they are: what codes are does not change how long kernels take. Other engines run the
dense network, in float32 and, where a dense recipe in integers is among the patterns, its integers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from engines import PLACES, tflite_file
from harness import arguments, bundle_folder, finish, head, progress

import edgepipe
from edgepipe import importer, passes
from edgepipe.benchmark import bench
from edgepipe.bundle import Bundle
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.sparsity.pattern import Pattern
from edgepipe.sparsity.pruning import mask
from edgepipe.target import Target

MODEL = "mobilenet-v1"
HEADERS = ["place", "recipe", "to dense fp32", "to the best", "min ms", "weights, to fp32",
           "engines, min ms"]  # fmt: skip
DENSE = "dense"
ROUNDS = 3


def masked(text: str, path: Path) -> Path:
    """MobileNetV1 with He weights, its pointwise ones masked at random and scaled up again."""
    source = importer.load("mobilenet-v1")
    model = passes.run(source.model, Context(Target.load("x86-64-v3"), Recipe()))
    rng = np.random.default_rng(0)
    for node in model.graph:
        value = node.inputs[1] if node.op_type == "Conv" else None
        weight = value.const_value.numpy() if value is not None and value.const_value else None
        if value is None or weight is None or weight.shape[2:] != (1, 1) or text == DENSE:
            continue
        pattern = Pattern.parse(text, "--patterns")
        kept = mask(rng.random((*weight.shape[:2], 1)), pattern)[..., None]
        value.const_value = ir.tensor(
            (weight * kept / np.sqrt(kept.mean())).astype(np.float32), name=value.name
        )
    ir.save(model, path)
    return path


@dataclass(frozen=True)
class Compiled:
    """A bundle, and the model that it was compiled from."""

    bundle: Bundle
    model: str | Path
    recipe: str

    @property
    def weights(self) -> int:
        """Bytes of weights.bin."""
        return int(self.bundle.manifest["memory"]["weights_bytes"])


def format_of(name: str) -> str:
    """fp32 of a pattern, the format of a recipe."""
    return name.partition("+")[0] if name.startswith("w") else "fp32"


def compiled(name: str, target: str, folder: Path) -> Compiled:
    """MobileNetV1 with the weights of a pattern, or by a recipe."""
    number = len(list(folder.iterdir()))
    output = folder / f"{target}-{number}"
    if format_of(name) == "fp32":
        path = masked(name, folder / f"{number}.onnx")
        return Compiled(edgepipe.compile(path, target=target, output=output), path, name)
    recipe = Recipe.read(name, {"methods": [], "max_samples": 8})
    bundle = edgepipe.compile(MODEL, target=target, recipe=recipe, output=output, emit=("onnx",))
    return Compiled(bundle, MODEL, name)


def measure(
    place: str, target: str, names: list[str], folder: Path, runs: int
) -> tuple[dict[str, Compiled], dict[str, float], dict[str, dict[str, float]]]:
    """The bundles by name, their smallest latencies, and those of engines by format, in ms."""
    kinds = {p.recipe: p for p in PLACES if (p.name, p.target) == (place, target)}
    made = {name: compiled(name, target, folder) for name in names if format_of(name) in kinds}
    best = dict.fromkeys(made, np.inf)
    engines: dict[str, dict[str, float]] = {kind: {} for kind in kinds}
    for _ in range(ROUNDS):
        for name, each in made.items():
            kind = kinds[format_of(name)]
            file = tflite_file(MODEL, kind.recipe)
            dense = name in (DENSE, kind.recipe)
            against = [e.format(file) for e in kind.engines if file or "{}" not in e]
            missing: list[str] = []
            result = bench(each.bundle, runner=kind.runner, runs=runs, model=each.model,
                           against=against if dense else ["none"], missing=missing)  # fmt: skip
            best[name] = min(best[name], result.ours.min_ms)
            found = engines[kind.recipe]
            for peer in result.peers:
                found[peer.engine] = min(found.get(peer.engine, np.inf), peer.min_ms)
            for reason in missing:
                progress(f"{place}: {reason}")
    return made, best, engines


def main() -> int:
    options = arguments(
        __doc__, places="host,node,browser", patterns="80%,90%,2:4v32,1:4v32", runs="60"
    )
    head("Sparse pointwise convolutions of MobileNetV1-224, one thread",
         "ai-edge-litert", "openvino", "ncnn")  # fmt: skip
    print(f"ratio: smallest latency of {ROUNDS} rounds, over that of the dense network in float32 "
          "here, and over that of the fastest engine in the same format\n")  # fmt: skip
    rows, results = [], []
    names = [DENSE, *options.patterns.split(",")]
    with bundle_folder(options.out) as folder:
        for place, target in dict.fromkeys((p.name, p.target) for p in PLACES):
            if place not in options.places.split(","):
                continue
            progress(f"{place}, {target}")
            made, best, engines = measure(place, target, names, folder, options.runs)
            for name, each in made.items():
                found = engines[format_of(name)]
                fastest = min(found.values(), default=np.nan)
                told = "; ".join(f"{engine} {ms:.2f}" for engine, ms in found.items())
                rows.append([f"{place}, {target}", name, f"{best[name] / best[DENSE]:.2f}",
                             f"{best[name] / fastest:.2f}", f"{best[name]:.2f}",
                             f"{each.weights / made[DENSE].weights:.3f}",
                             told if name in (DENSE, format_of(name)) else ""])  # fmt: skip
                results.append({"place": place, "target": target, "recipe": name,
                                "min_ms": best[name], "weights_bytes": each.weights,
                                "engines": found})  # fmt: skip
                progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
