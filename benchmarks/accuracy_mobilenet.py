"""What quantization costs MobileNetV2 in likeness to the float network, seconds and memory.

    python benchmarks/accuracy_mobilenet.py [--shared DIR] [--recipes w8a8,w4a8] [--samples 512]
        [--regions anywhere,left]

There are no labelled images here, so nothing is said of accuracy. Images are random square crops
of the two photographs that scikit-learn brings along, 96 to 256 pixels wide, scaled to 224²,
half of them mirrored. Calibration sees crops of anywhere, or of the left 60 % of each; figures
are given for other crops of anywhere and of the right 40 %, of which calibration on the left has
seen no pixel. Quantization runs in a process of its own, one thread: its CPU seconds and its peak
resident memory include the imports and the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

SIZE = 224
SMALLEST, LARGEST = 96, 256
HELD_BACK = 400
LEFT, RIGHT, ALL = (0.0, 0.6), (0.6, 1.0), (0.0, 1.0)
REGIONS = {"anywhere": ALL, "left": LEFT}


def crops(count: int, columns: tuple[float, float], seed: int) -> np.ndarray:
    """Preprocessed crops [count,3,224,224] float32 of these columns (shares of the width)."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator = np.random.default_rng(seed)
    photographs = load_sample_images().images
    result = np.empty((count, 3, SIZE, SIZE), np.float32)
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        height, width = photograph.shape[:2]
        first, last = (int(share * width) for share in columns)
        side = int(generator.integers(SMALLEST, LARGEST + 1))
        top = int(generator.integers(0, height - side + 1))
        left = int(generator.integers(first, last - side + 1))
        image = Image.fromarray(photograph[top : top + side, left : left + side])
        pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
        if generator.integers(2):
            pixels = pixels[:, ::-1]
        result[index] = (pixels.transpose(2, 0, 1).astype(np.float32) - 127.5) / 127.5
    return result


def quantize(arguments: argparse.Namespace) -> None:
    """Write the quantized model of one recipe, and the seconds it took, into ``arguments.out``."""
    import time

    import onnx_ir as ir

    from edgepipe import importer, passes, quantization
    from edgepipe.context import Context
    from edgepipe.quantization import QuantConfig
    from edgepipe.recipe import Recipe
    from edgepipe.target import Target

    context = Context(Target.load("host"), Recipe())
    source = importer.load(arguments.shared / "models" / "mobilenet_v2_224.onnx", None)
    graph = passes.run(source.model, context)
    ir.save(graph, arguments.out / "float.onnx")
    samples = crops(arguments.samples, REGIONS[arguments.regions], 1)
    name = graph.graph.inputs[0].name
    changes = dict(accuracy_cifar().change(item) for item in arguments.set)
    config = QuantConfig.parse(arguments.recipes, **changes)
    start = time.process_time()
    stream = ({name: x[None]} for x in samples)
    ir.save(quantization.apply(graph, config, stream, context), arguments.out / "quantized.onnx")
    seconds = time.process_time() - start
    (arguments.out / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")


def accuracy_cifar() -> object:
    """The sibling script: it runs models and reads ``--set``."""
    sys.path.insert(0, str(Path(__file__).parent))
    import accuracy_cifar as sibling

    return sibling


def measure(recipe: str, region: str, arguments: argparse.Namespace, sets: list[np.ndarray]) -> str:
    """One line of the table."""
    import onnx_ir as ir

    from edgepipe.metrics import Distance

    with tempfile.TemporaryDirectory() as folder:
        usage, out = Path(folder) / "usage.json", Path(folder)
        shim = [sys.executable, "-S", str(Path(__file__).with_name("rusage.py")), str(usage)]
        options = [f"--set={item}" for item in arguments.set]
        command = [sys.executable, __file__, "--out", folder, "--recipes", recipe, *options]
        command += ["--shared", str(arguments.shared), "--samples", str(arguments.samples)]
        command += ["--regions", region]
        subprocess.run([*shim, *command], check=True)
        peak = json.loads(usage.read_text(encoding="utf-8"))["peak_bytes"]
        seconds = json.loads((out / "seconds.json").read_text(encoding="utf-8"))
        models = [ir.load(out / f"{kind}.onnx") for kind in ("float", "quantized")]
        line = f"{recipe:8} {region:14} {seconds:6.1f} {peak / 2**30:10.2f}"
        for x in sets:
            reference, result = (accuracy_cifar().logits(model, x) for model in models)
            distance = Distance()
            distance.add(result, reference)
            agreement = 100 * distance.agreeing / distance.rows
            line += f"   {agreement:6.2f}%  {distance.snr_db:6.2f}"
    return line


def main() -> None:
    """Print one line per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--recipes", default="w8a8,w4a8")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--regions", default="anywhere,left", help="that calibration sees crops of")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.out:
        quantize(arguments)
        return
    from edgepipe.machine import machine, one_line, versions

    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "numpy", "onnx-ir")))
    print("                                            anywhere            right")
    of_set = "   agreement  SNR dB"
    print("recipe   calibrated on   CPU s   peak GiB" + 2 * of_set, flush=True)
    sets = [crops(HELD_BACK, ALL, 2), crops(HELD_BACK, RIGHT, 3)]
    for recipe in arguments.recipes.split(","):
        for region in arguments.regions.split(","):
            print(measure(recipe, region, arguments, sets), flush=True)


if __name__ == "__main__":
    main()
