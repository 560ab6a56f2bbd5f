"""What patterns cost CIFAR-10 networks that are pruned in one go, and amounts by layer beside them.

    python benchmarks/accuracy_amounts.py [--shared DIR] [--networks a,b] [--target T] [--distill N]
                                          [--recipes fp32+2:4,…]

Accuracy on cifar10_val2000 by ONNX Runtime. "no data": the smallest weights go, and nothing else
changes; "data": places and weights are found with the first 512 images of cifar10_train5000;
"distilled": what is left is trained on the same images, without their labels, for N epochs as well,
in so many CPU seconds (one thread), pruning included. "estimate" is the vector instructions of the
layers that are pruned, in the target's cheapest float32 kernel each, over those of the dense
network: what ``auto`` and the budget "latency" spend. It is no latency.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import onnx_ir as ir
from accuracy_cifar import images, logits

from edgepipe import importer, passes, prune
from edgepipe.context import Context
from edgepipe.data import Samples
from edgepipe.machine import machine, one_line, versions
from edgepipe.prune import cost
from edgepipe.quantization.layers import Layer, prunable
from edgepipe.recipe import Recipe
from edgepipe.sparsity.pattern import Pattern
from edgepipe.target import Target

NETWORKS = "ic_resnet8,ic_resnet8_large,cifar_resnet20"
PATTERNS = (
    "4:8", "2:4", "2:4v8", "2:4v16", "2:4v32", "1:4", "1:4v8", "1:4v16", "1:4v32", "1:8",
    "70%", "80%", "90%", "50%b1x4", "80%b1x4",
)  # fmt: skip
RECIPES: tuple[tuple[str, dict[str, str]], ...] = (
    ("fp32", {}),
    *((f"fp32+{pattern}", {}) for pattern in PATTERNS),
    ("fp32+80%", {"amounts": "erk"}),
    ("fp32+80%", {"amounts": "search"}),
    ("fp32+80%", {"amounts": "search", "budget": "bytes"}),
    ("fp32+80%", {"amounts": "search", "budget": "latency"}),
    ("fp32+auto30%", {}),
    ("fp32+auto50%", {}),
    ("fp32+auto65%", {}),
)


def estimate(model: ir.Model, target: Target) -> float:
    """Vector instructions of the layers that can be pruned."""
    layers = [(n, Layer.of(n)) for n in prunable(model.graph, Pattern(auto=True))]
    return sum(cost.of(n, v.matrix(v.weight)[0] != 0, "latency", target) for n, v in layers)


def measure(shared: Path, network: str, target: Target, epochs: int, recipes: list[str]) -> None:
    """Print the lines of one network, of ``recipes`` alone where there are any."""
    x, labels = images(shared, "cifar10_val2000", network)
    train = images(shared, "cifar10_train5000", network)[0]
    samples = Samples("train", len(train), lambda: ({"x": train[i : i + 1]} for i in range(512)))
    source = importer.load(shared / "models" / f"{network}.onnx", None)
    graph = passes.run(source.model, Context(target, Recipe()))

    def run(line: str, settings: dict[str, Any], data: Samples | None) -> Any:
        recipe = Recipe.read(line, settings)
        return prune.run(graph, source, data, Context(target, recipe, progress=lambda _: None))

    def accuracy(model: ir.Model) -> str:
        return f"{100 * float(np.mean(logits(model, x).argmax(1) == labels)):.2f}"

    for line, settings in [r for r in RECIPES if not recipes or r[0] in recipes]:
        plain = trained = seconds = ""
        if not settings and "auto" not in line:
            plain = accuracy(run(line, settings, None)[0])
        model, pruned = run(line, settings, samples)
        if epochs and pruned is not None:
            start = time.process_time()
            trained = accuracy(run(line, {**settings, "distill": epochs}, samples)[0])
            seconds = f"{time.process_time() - start:.0f}"
        macs = {"left": 1, "dense": 1} if pruned is None else pruned.manifest["macs"]
        print(
            f"{network:16} {line:14} {settings.get('amounts', ''):8} "
            f"{settings.get('budget', ''):8} {plain:>7} {accuracy(model):>6} {trained:>10} "
            f"{seconds:>6}  {estimate(model, target) / estimate(graph, target):8.2f}  "
            f"{macs['left'] / macs['dense']:.2f}",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--networks", default=NETWORKS)
    parser.add_argument("--target", default="wasm-simd")
    parser.add_argument("--recipes", default="", help="these lines of the table alone")
    parser.add_argument("--distill", type=int, default=30, metavar="EPOCHS", help="0: do not")
    chosen = parser.parse_args()
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "numpy", "torch")))
    print("network          recipe         amounts  budget   no data   data  distilled  CPU s  "
          "estimate  multiplications left", flush=True)  # fmt: skip
    if chosen.distill:
        import torch

        torch.set_num_threads(1)
    for network in chosen.networks.split(","):
        recipes = [r for r in chosen.recipes.split(",") if r]
        measure(chosen.shared, network, Target.load(chosen.target), chosen.distill, recipes)


if __name__ == "__main__":
    main()
