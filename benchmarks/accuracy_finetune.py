"""What fine-tuning gains: CIFAR-10 networks, float and quantized, trained the same way.

    python benchmarks/accuracy_finetune.py [--shared DIR] [--networks a,b] [--recipes w4a8,w4a4]

Training: the 5000 images of cifar10_train5000, from the same file, with the same loop, epochs and
augmentation, float and quantized alike; the quantized networks are compared with the float one
after its own training. Figures: accuracy on cifar10_val2000, which nothing was chosen by, in
ONNX Runtime on the graph that results (Q/DQ where quantized). Seconds are CPU seconds of
``finetune.run``, one thread, calibration included. ``--seeds N`` repeats with other seeds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

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
RECIPES = ("w8a8", "w4a8", "w4a4")
#: Epochs that keep one training within ten CPU minutes.
EPOCHS = {"ic_resnet8": 20, "cifar_resnet20": 8}
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

    def quantized(self, recipe: str) -> float:
        """Accuracy without training, calibrated on the first SAMPLES training images."""
        x = self.data[0]
        samples = [{"x": x[i : i + 1]} for i in range(SAMPLES)]
        config = QuantConfig.parse(recipe)
        return self.accuracy(quantization.apply(self.graph, config, samples, self.context))

    def tuned(
        self, recipe: str | None, settings: FinetuneSettings, teacher: ir.Model | None
    ) -> tuple[ir.Model, float]:
        """The fine-tuned model and CPU seconds; float without ``recipe``."""
        start = time.process_time()
        config = None if recipe is None else QuantConfig.parse(recipe)
        model = run(self.graph, config, self.data, settings, self.context, teacher)
        return model, time.process_time() - start


def main() -> None:
    """Print one line per network, recipe and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    changes = {}
    for item in arguments.set:
        field, _, value = item.partition("=")
        changes[field] = value if value.isalpha() else float(value)
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "numpy", "torch")))
    print("network            seed  recipe  before   after  to tuned float  CPU s", flush=True)
    for network in arguments.networks.split(","):
        measured = Measurement(arguments.shared, network)
        before = {"float": measured.accuracy(measured.graph)}
        before |= {r: measured.quantized(r) for r in arguments.recipes.split(",")}
        for seed in range(arguments.seeds):
            settings = FinetuneSettings(
                epochs=arguments.epochs or EPOCHS[network],
                augmentation="shift_flip",
                seed=seed,
                **changes,
            )
            reference = None
            for recipe in before:
                model, seconds = measured.tuned(
                    None if recipe == "float" else recipe, settings, None
                )
                after = measured.accuracy(model)
                reference = after if reference is None else reference
                print(
                    f"{network:18} {seed:4}  {recipe:7} {before[recipe]:5.2f}  {after:6.2f}"
                    f"  {after - reference:+14.2f}  {seconds:5.0f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
