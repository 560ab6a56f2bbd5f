"""What sparsity costs CIFAR-10 networks, pruned in one go and trained, beside the dense network.

    python benchmarks/accuracy_sparse.py [--shared DIR] [--networks a,b] [--recipes fp32+2:4,…]

1. The float network is fine-tuned on the 5000 images of cifar10_train5000: the teacher.
2. From the float network again, towards labels and teacher, the dense network is fine-tuned, and so
   is every sparse recipe: same images, loop, normalization, epochs and seed. These are compared.
   "last" prunes in one go and learns labels last, "outputs" prunes "dense, long" in one go and
   teaches it its own outputs, "kept" has labels in all epochs, the other ways prune while they
   train. Without labels a dense network stays what it is, so "dense" has as many epochs as "last"
   has with labels; "dense, long" has labels in all epochs.
3. Recipes in integers are the trained sparse network, calibrated on 512 of the images.

Figures: accuracy on cifar10_val2000, by ONNX Runtime on the graph that results; "one-shot" is what
``edgepipe compile`` does with the float network, refitted to the first 512 images. One image is
0.05 points. "zeros" is the share of zero weights in the layers that are pruned. Seconds are CPU
seconds of the training, one thread. ``--epochs`` are those of 2. With ``--checkpoints DIR``
an interrupted measurement goes on there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import onnx_ir as ir
from accuracy_finetune import FIRST, SECOND, Measurement, begin, options, progress

from edgepipe import finetune, importer, prune
from edgepipe.context import Context
from edgepipe.data import Samples
from edgepipe.importer.source import Source
from edgepipe.quantization.finetune import FinetuneSettings
from edgepipe.quantization.finetune.settings import NORMALIZATIONS
from edgepipe.recipe import Recipe
from edgepipe.sparsity.pattern import KEPT
from edgepipe.target import Target

NETWORKS = ("ic_resnet8", "ic_resnet8_large", "cifar_resnet20")
RECIPES = (
    "fp32+2:4", "fp32+2:4v8", "fp32+1:4", "fp32+80%", "fp32+80%b1x4", "w8a8+2:4", "w8a8+80%b1x4",
)  # fmt: skip
#: More steps than ``accuracy_finetune`` has: zeros want them more than anything else.
FIRST, SECOND = replace(FIRST, batch=32), replace(SECOND, learning_rate=8e-3)
#: The ways of ``finetune.sparse``: labels last, and from the fine-tuned network, without labels.
LAST, OUTPUTS = "last", "outputs"
#: Epochs of the teacher, of the others and, of these, those with labels where they come last;
#: images of a step; the way. The smallest network wants most steps, the largest has weights to
#: spare. Ten minutes are enough for any training.
PLANS = {
    "ic_resnet8": (40, 90, 10, 16, LAST),
    "ic_resnet8_large": (20, 28, 20, 32, OUTPUTS),
    "cifar_resnet20": (40, 40, 10, 32, LAST),
}


def one_shot(
    measured: Measurement, pattern: str, shared: Path, name: str, amounts: str
) -> tuple[ir.Model, str | Mapping[str, str]]:
    """The float network pruned as the compiler prunes, with ``amounts`` where the pattern takes
    them; and the pattern, by layers where they differ."""
    x = measured.data[0]
    samples = Samples("train", len(x), lambda: ({"x": x[i : i + 1]} for i in range(len(x))))
    source, context = given(shared, name, pattern, amounts)
    model, pruned = prune.run(measured.graph, source, samples, context)
    assert pruned is not None
    return model, pruned.manifest.get("patterns", pattern)


def given(shared: Path, name: str, pattern: str, amounts: str) -> tuple[Source, Context]:
    """The network and what is to become of it."""
    settings = {"amounts": amounts} if "%" in pattern else {}
    recipe = Recipe.read(f"fp32+{pattern}", settings)
    context = Context(Target.load("host"), recipe, progress=lambda _: None)
    return importer.load(shared / "models" / f"{name}.onnx", None), context


def pruned_and_trained(
    graph: ir.Model,
    measured: Measurement,
    given: tuple[Source, Context],
    settings: FinetuneSettings,
    teacher: ir.Model,
    labelled: int,
) -> tuple[ir.Model, float]:
    """``graph`` pruned, then trained, labels last, if any; and CPU seconds."""
    start = time.process_time()
    source, context = given
    model, _ = finetune.sparse(graph, source, measured.data, settings, context, teacher, labelled)
    return model, time.process_time() - start


def zeros(model: ir.Model) -> float:
    """Percent of zero weights in the layers that sparse kernels run, of a float or Q/DQ graph."""
    live = count = 0
    for node in model.graph:
        if node.op_type == "Conv" and node.inputs[0] not in model.graph.inputs:
            value = node.inputs[1]
            while value.producer() is not None:  # through DequantizeLinear
                value = value.producer().inputs[0]
            array = value.const_value.numpy()
            live, count = live + int(np.count_nonzero(array)), count + array.size
    return 100 * (1 - live / count)


def measure(arguments: argparse.Namespace, network: str) -> None:
    """Print the lines of one network."""
    measured, folder = Measurement(arguments.shared, network), arguments.checkpoints
    first_epochs, epochs, labelled, batch, way = PLANS[network]
    ways = (arguments.ways or way).split(",")
    epochs = arguments.epochs or epochs
    labelled = min(labelled, epochs)

    def stored(settings: FinetuneSettings, name: str) -> FinetuneSettings:
        kept = None if folder is None else folder / f"{network}-{name}"
        return replace(settings, checkpoint=kept)

    def line(*cells: object) -> None:
        print("{:16} {:19} {:>8}  {:>6}  {:>14}  {:>7}  {:>6}".format(*cells), flush=True)

    line(network, "float", "", f"{measured.accuracy(measured.graph):.2f}", "", "", "")
    first = stored(replace(FIRST, epochs=first_epochs), "stage1")
    teacher, seconds = measured.tuned(measured.graph, None, first)
    line(network, "teacher", "", f"{measured.accuracy(teacher):.2f}", "", "", f"{seconds:.0f}")
    second = replace(SECOND, epochs=epochs, batch=batch, normalization=arguments.normalization)
    if arguments.rate:
        second = replace(second, learning_rate=arguments.rate)
    references = []
    for what, count in ("dense", labelled), ("dense, long", epochs):
        if count < epochs and LAST not in ways:
            continue
        own = stored(replace(second, epochs=count), what.replace(", ", "-"))
        dense, seconds = measured.tuned(measured.graph, None, own, teacher)
        references.append(measured.accuracy(dense))
        line(network, what, "", f"{references[-1]:.2f}", "", "", f"{seconds:.0f}")
    for recipe in arguments.recipes.split(","):
        format, _, pattern = recipe.partition("+")
        pruned, patterns = one_shot(measured, pattern, arguments.shared, network, arguments.amounts)
        shot = measured.accuracy(pruned)
        for way in ways:
            name = f"{pattern}-{way}-{arguments.amounts}".replace("%", "").replace(":", "-")
            settings = stored(replace(second, sparsity=KEPT), name)
            if way in (LAST, OUTPUTS):
                begun, count = (dense, 0) if way == OUTPUTS else (measured.graph, labelled)
                task = given(arguments.shared, network, pattern, arguments.amounts)
                model, seconds = pruned_and_trained(begun, measured, task, settings, teacher, count)
            elif way == KEPT:
                model, seconds = measured.tuned(pruned, None, settings, teacher)
            else:
                settings = replace(settings, sparsity=patterns, pruning=way)
                model, seconds = measured.tuned(measured.graph, None, settings, teacher)
            if format != "fp32":
                model = measured.calibrated(model, format)
            after = measured.accuracy(model)
            progress(f"{recipe} {way}: {after:.2f}")
            differences = "".join(f"{after - r:+7.2f}" for r in references)
            line(network, f"{recipe} {way}", f"{shot:.2f}", f"{after:.2f}", differences,
                 f"{zeros(model):.1f}", f"{seconds:.0f}")  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = options(__doc__.splitlines()[0], NETWORKS, RECIPES)
    parser.add_argument("--amounts", default="erk", help="of S%%: uniform, erk, search")
    parser.add_argument("--normalization", default="batch", choices=NORMALIZATIONS)
    parser.add_argument("--rate", type=float, help="learning rate from the float network")
    parser.add_argument("--ways", help="last, outputs, kept, gradual, decay, straight")
    arguments = parser.parse_args()
    begin(
        "network          recipe                 one-shot  tuned  to dense, long  zeros %   CPU s"
    )
    for network in arguments.networks.split(","):
        measure(arguments, network)


if __name__ == "__main__":
    main()
