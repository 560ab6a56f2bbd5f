"""What quantization costs in accuracy: three CIFAR-10 networks, calibrated on other images.

    python benchmarks/accuracy_cifar.py [--shared DIR] [--networks a,b] [--recipes w8a8,w4a8]
    python benchmarks/accuracy_cifar.py --methods all        # the methods side by side

Calibration: the first 512 images of cifar10_train5000, with ``--sets N`` by N times 512 others in
turn (how much of a figure is chance); figures: all of cifar10_val2000, or with
``--held-back`` training images that calibration did not see, by which settings are chosen (the
networks were trained on them: their accuracy there says little, agreement and SNR do). The
quantized graph runs in ONNX Runtime on its Q/DQ form (``--interpreter N``: the first N images in
the integer interpreter too, compared code by code). Seconds are CPU seconds of
``quantization.apply``, one thread, everything included.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import onnx_ir as ir
import onnxruntime

from edgepipe import importer, passes, quantization
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.machine import machine, one_line, versions
from edgepipe.metrics import Distance
from edgepipe.quantization import QuantConfig
from edgepipe.recipe import Recipe
from edgepipe.target import Target

NETWORKS = ("ic_resnet8", "ic_resnet8_large", "cifar_resnet20")
RECIPES = ("w8a8", "w4a8", "w4a4")
SAMPLES = 512
HELD_BACK = 2500
#: What ``--methods all`` sets side by side.
COMPARED = (
    (), ("bias_correction",), ("mean_variance",), ("gptq",), ("adaround",), ("adaquant",),
    ("nncf",), ("equalization", "reconstruction"), ("reconstruction",),
)  # fmt: skip
MEAN, DEVIATION = (
    np.array(v, np.float32).reshape(1, 3, 1, 1)
    for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)


def images(shared: Path, name: str, network: str) -> tuple[np.ndarray, np.ndarray]:
    """Preprocessed images [N,3,32,32] float32 and labels [N]."""
    with np.load(shared / "data" / f"{name}.npz") as data:
        x = np.ascontiguousarray(data["images"].transpose(0, 3, 1, 2), np.float32)
        labels = data["labels"].ravel()
    return ((x / 255 - MEAN) / DEVIATION if network == "cifar_resnet20" else x), labels


def logits(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """Outputs [N,classes], image by image."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # Without VNNI, ONNX Runtime's own 8-bit kernels saturate in int16 and compute something else
    # than the Q/DQ model says: 72.4 instead of 75.2 % on ic_resnet8.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    (name,) = [value.name for value in session.get_inputs()]
    return np.concatenate([session.run(None, {name: x[i : i + 1]})[0] for i in range(len(x))])


def integer_check(model: ir.Model, x: np.ndarray, expected: np.ndarray) -> str:
    """Logits of the integer interpreter against those of ONNX Runtime, in words."""
    from edgepipe.quantization.interpreter import Interpreter

    interpreter = Interpreter(model)
    found = np.concatenate([interpreter.run({"x": x[i : i + 1]})["logits"] for i in range(len(x))])
    same = np.mean(found.argmax(1) == expected.argmax(1))
    distance = Distance()
    distance.add(found, expected)
    return f"  integers: top-1 equal {same:.2%}, SNR to ONNX Runtime {distance.snr_db:.1f} dB"


def network_lines(network: str, arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of one network: every recipe by every method and on every set of images."""
    training, trained_labels = images(arguments.shared, "cifar10_train5000", network)
    sets = [
        [{"x": training[i : i + 1]} for i in range(SAMPLES * n, SAMPLES * (n + 1))]
        for n in range(arguments.sets)
    ]
    x, labels = images(arguments.shared, "cifar10_val2000", network)
    if arguments.held_back:
        first = SAMPLES * arguments.sets
        last = first + HELD_BACK
        x, labels = training[first:last], trained_labels[first:last]
    context = Context(Target.load("host"), Recipe())
    source = importer.load(arguments.shared / "models" / f"{network}.onnx", None)
    graph = passes.run(source.model, context)
    reference = logits(graph, x)
    exact = 100 * np.mean(reference.argmax(1) == labels)
    for recipe in arguments.recipes.split(","):
        for methods, samples in product(chosen_methods(arguments.methods), sets):
            changes = dict(change(item) for item in arguments.set)
            if methods is not None:
                changes["methods"] = methods
            try:
                config = QuantConfig.parse(recipe, **changes)
                start = time.process_time()
                model = quantization.apply(graph, config, samples, context)
            except UserError as error:
                yield f"{network:16} {recipe:6} {'+'.join(methods or ()):28} {error}"
                continue
            seconds = time.process_time() - start
            result = logits(model, x)
            distance = Distance()
            distance.add(result, reference)
            top1 = 100 * np.mean(result.argmax(1) == labels)
            agreement = 100 * distance.agreeing / distance.rows
            yield (
                f"{network:16} {recipe:6} {'+'.join(config.methods) or 'rounding':28}"
                f" {exact:5.2f}  {top1:9.2f}  {top1 - exact:+6.2f}"
                f"  {agreement:8.2f}%  {distance.snr_db:7.2f}  {seconds:5.1f}"
            )
            if arguments.interpreter:
                n = arguments.interpreter
                yield integer_check(model, x[:n], result[:n])


def chosen_methods(text: str) -> list[tuple[str, ...] | None]:
    """``all``, or lists of methods joined by ``+`` and separated by commas; None: the default."""
    if text == "all":
        return list(COMPARED)
    return [tuple(part.split("+")) for part in text.split(",")] if text else [None]


def main() -> None:
    """Print one line per network, recipe and method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--methods", default="", help="all, or e.g. gptq,equalization+gptq")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--sets", type=int, default=1, metavar="N")
    parser.add_argument("--held-back", action="store_true")
    parser.add_argument("--interpreter", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "numpy", "onnx-ir", "torch", "nncf")))
    print(
        f"{'network':16} {'recipe':6} {'methods':28}"
        " float  quantized  change  agreement   SNR dB  CPU s",
        flush=True,
    )
    for network in arguments.networks.split(","):
        for line in network_lines(network, arguments):
            print(line, flush=True)


def change(item: str) -> tuple[str, object]:
    """Field and value of ``FIELD=VALUE``: a tuple where there are commas, a bool, int or str."""
    field, _, value = item.partition("=")
    if "," in value or value == "":
        return field, tuple(part for part in value.split(",") if part)
    if value in ("true", "false"):
        return field, value == "true"
    return field, int(value) if value.lstrip("-").isdigit() else value


if __name__ == "__main__":
    main()
