"""Amounts and patterns by layer beside uniform ones, pruned in one go, of a CIFAR-10 network.

    python benchmarks/accuracy_amounts.py [--shared DIR] [--network N] [--target T]

"estimate" is the vector instructions of the layers that are pruned, in the target's cheapest
float32 kernel each, over those of the dense network: what ``auto`` and the budget "latency" spend.
It is no latency.
Accuracy on cifar10_val2000 by ONNX Runtime, refitted to the first images of cifar10_train5000.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

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

RECIPES: tuple[tuple[str, dict[str, str]], ...] = (
    ("fp32+70%", {}),
    ("fp32+70%", {"amounts": "erk"}),
    ("fp32+70%", {"amounts": "search"}),
    ("fp32+70%", {"amounts": "search", "budget": "bytes"}),
    ("fp32+70%", {"amounts": "search", "budget": "latency"}),
    ("fp32+2:4", {}),
    ("fp32+2:4v8", {}),
    ("fp32+1:4", {}),
    ("fp32+auto30%", {}),
    ("fp32+auto50%", {}),
)


def estimate(model: ir.Model, target: Target) -> float:
    """Vector instructions of the layers that can be pruned."""
    layers = [(n, Layer.of(n)) for n in prunable(model.graph, Pattern(auto=True))]
    return sum(cost.of(n, v.matrix(v.weight)[0] != 0, "latency", target) for n, v in layers)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--network", default="ic_resnet8")
    parser.add_argument("--target", default="wasm-simd")
    chosen = parser.parse_args()
    x, labels = images(chosen.shared, "cifar10_val2000", chosen.network)
    train = images(chosen.shared, "cifar10_train5000", chosen.network)[0]
    samples = Samples("train", len(train), lambda: ({"x": train[i : i + 1]} for i in range(512)))
    source = importer.load(chosen.shared / "models" / f"{chosen.network}.onnx", None)
    target = Target.load(chosen.target)
    graph = passes.run(source.model, Context(target, Recipe()))
    print(one_line(machine()), one_line(versions("edgepipe", "onnxruntime", "numpy")), sep="\n")
    print("recipe         amounts  budget   accuracy  estimate  multiplications left", flush=True)
    for line, settings in (("fp32", {}), *RECIPES):
        context = Context(target, Recipe.read(line, settings))
        model, pruned = prune.run(graph, source, samples, context)
        macs = {"left": 1, "dense": 1} if pruned is None else pruned.manifest["macs"]
        print(
            f"{line:14} {settings.get('amounts', ''):8} {settings.get('budget', ''):8} "
            f"{100 * float(np.mean(logits(model, x).argmax(1) == labels)):8.2f}  "
            f"{estimate(model, target) / estimate(graph, target):8.2f}  "
            f"{macs['left'] / macs['dense']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
