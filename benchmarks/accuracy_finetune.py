"""What fine-tuning gains: CIFAR-10 networks, float and quantized, trained the same way.

    python benchmarks/accuracy_finetune.py [--shared DIR] [--networks a,b] [--recipes w4a8,w4a4]

1. The float network is fine-tuned on the 5000 images of cifar10_train5000.
2. From there, with that network as the teacher, the float network is fine-tuned once more, and so
   is every recipe: same images, loop, loss, rate, epochs and seed. These are compared.

Figures: accuracy on cifar10_val2000, by ONNX Runtime on the graph that results (Q/DQ where
quantized); "calibrated" is the recipe on the network of 1 without training. One image is 0.05
points; two equally good networks differ by half a point on 2000 images. Rates and the share of
the teacher were chosen on 1000 of the training images. Seconds are CPU seconds of
``finetune.run``, one thread, calibration included. With ``--checkpoints DIR`` an interrupted
measurement goes on there (seconds are then of the last part).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import onnx_ir as ir
from accuracy_cifar import images, logits

from edgepipe import importer, passes, quantization
from edgepipe.context import Context
from edgepipe.machine import machine, one_line, versions
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.finetune import FinetuneSettings, run
from edgepipe.recipe import Recipe
from edgepipe.target import Target

NETWORKS = ("ic_resnet8", "cifar_resnet20")
RECIPES = ("w4a8", "w4a4")
#: Epochs of either stage.
EPOCHS = {"ic_resnet8": 20, "cifar_resnet20": 6}
FIRST = FinetuneSettings(augmentation="shift_flip")
SECOND = replace(FIRST, learning_rate=2e-3, distillation=0.5)
SAMPLES = 512


def progress(line: str) -> None:
    """A line on stderr."""
    print(f"  {line}", file=sys.stderr, flush=True)


class Measurement:
    """One network: its float graph, its data, and the accuracy of what is made of it."""

    def __init__(self, shared: Path, network: str) -> None:
        self.data = images(shared, "cifar10_train5000", network)
        self.x, self.labels = images(shared, "cifar10_val2000", network)
        self.context = Context(Target.load("host"), Recipe(), progress=progress)
        source = importer.load(shared / "models" / f"{network}.onnx", None)
        self.graph = passes.run(source.model, self.context)

    def accuracy(self, model: ir.Model) -> float:
        """Percent of validation images."""
        return 100 * float(np.mean(logits(model, self.x).argmax(1) == self.labels))

    def calibrated(self, graph: ir.Model, recipe: str) -> ir.Model:
        """``graph`` quantized without training, on the first SAMPLES images."""
        x = self.data[0]
        samples = [{"x": x[i : i + 1]} for i in range(SAMPLES)]
        return quantization.apply(graph, QuantConfig.parse(recipe), samples, self.context)

    def tuned(
        self,
        graph: ir.Model,
        recipe: str | None,
        settings: FinetuneSettings,
        teacher: ir.Model | None = None,
    ) -> tuple[ir.Model, float]:
        """The fine-tuned model and CPU seconds; float without ``recipe``."""
        start = time.process_time()
        config = None if recipe is None else QuantConfig.parse(recipe)
        model = run(graph, config, self.data, settings, self.context, teacher)
        return model, time.process_time() - start


def measure(
    measured: Measurement, network: str, recipes: list[str], epochs: int, folder: Path | None
) -> None:
    """Print the lines of one network."""

    def tuned(
        graph: ir.Model, recipe: str | None, settings: FinetuneSettings, name: str
    ) -> tuple[ir.Model, float]:
        kept = None if folder is None else folder / f"{network}-{name}"
        return measured.tuned(graph, recipe, replace(settings, epochs=epochs, checkpoint=kept))

    def line(what: str, calibrated: str, after: float, change: str, seconds: float) -> None:
        print(
            f"{network:16} {what:14} {calibrated:>10}  {after:5.2f}  {change:>14}  {seconds:5.0f}",
            flush=True,
        )

    line("float", "", measured.accuracy(measured.graph), "", 0)
    first, seconds = tuned(measured.graph, None, FIRST, "stage1")
    line("float, stage 1", "", measured.accuracy(first), "", seconds)
    again, seconds = tuned(first, None, SECOND, "stage2")
    reference = measured.accuracy(again)
    line("float, stage 2", "", reference, "", seconds)
    for recipe in recipes:
        model, seconds = tuned(first, recipe, SECOND, recipe)
        after = measured.accuracy(model)
        progress(f"{recipe} tuned: {after:.2f}")
        plain = measured.accuracy(measured.calibrated(first, recipe))
        line(recipe, f"{plain:.2f}", after, f"{after - reference:+.2f}", seconds)


def options(description: str, networks: tuple[str, ...], recipes: tuple[str, ...]) -> Any:
    """A parser of what measurements of trainings have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--networks", default=",".join(networks))
    parser.add_argument("--recipes", default=",".join(recipes))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--checkpoints", type=Path, metavar="DIR")
    return parser


def begin(header: str) -> None:
    """One thread; the machine, the versions and the table's first line."""
    import torch

    torch.set_num_threads(1)
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "numpy", "torch")))
    print(header, flush=True)


def main() -> None:
    """Print the table."""
    arguments = options(__doc__.splitlines()[0], NETWORKS, RECIPES).parse_args()
    begin("network          what           calibrated  tuned  to float tuned  CPU s")
    for network in arguments.networks.split(","):
        measured = Measurement(arguments.shared, network)
        epochs = arguments.epochs or EPOCHS[network]
        recipes = arguments.recipes.split(",")
        measure(measured, network, recipes, epochs, arguments.checkpoints)


if __name__ == "__main__":
    main()
