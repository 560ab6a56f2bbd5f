"""What quantization costs the keyword network in likeness to float, on made-up spectra.

    python benchmarks/accuracy_kws.py [--shared DIR] [--recipes w8a8,w4a8,w4a4]

There are no recordings here. Inputs are random walks with the proportions of MFCCs: 49 frames by
10 coefficients, the first large and negative, the others falling off, neighbours in time alike.
Calibration and comparison take different ones, so the figures say how well layers are fitted to
what calibration shows; they say nothing of accuracy on speech.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from accuracy_cifar import change, logits

from edgepipe import importer, passes, quantization
from edgepipe.context import Context
from edgepipe.machine import machine, one_line, versions
from edgepipe.metrics import Distance
from edgepipe.quantization import QuantConfig
from edgepipe.recipe import Recipe
from edgepipe.target import Target

SAMPLES, HELD_BACK = 512, 1000
FRAMES, COEFFICIENTS = 49, 10
#: Mean and deviation of the first coefficient, deviation of the second; the rest fall as 1 / index.
FIRST, SECOND = (-25.0, 30.0), 20.0
#: Correlation of neighbouring frames.
MEMORY = 0.85


def spectra(count: int, seed: int) -> np.ndarray:
    """[count,1,49,10] float32."""
    generator = np.random.default_rng(seed)
    steps = generator.standard_normal((count, FRAMES, COEFFICIENTS))
    for frame in range(1, FRAMES):
        fresh = np.sqrt(1 - MEMORY**2) * steps[:, frame]
        steps[:, frame] = MEMORY * steps[:, frame - 1] + fresh
    deviation = np.array([FIRST[1], *(SECOND / i for i in range(1, COEFFICIENTS))])
    steps *= deviation
    steps[..., 0] += FIRST[0]
    return steps[:, None].astype(np.float32)


def main() -> None:
    """Print one line per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--recipes", default="w8a8,w4a8,w4a4")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    arguments = parser.parse_args()
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "numpy", "onnx-ir")))
    context = Context(Target.load("host"), Recipe())
    source = importer.load(arguments.shared / "models" / "kws_dscnn.onnx", None)
    graph = passes.run(source.model, context)
    name = graph.graph.inputs[0].name
    samples = [{name: x[None]} for x in spectra(SAMPLES, 1)]
    x = spectra(HELD_BACK, 2)
    reference = logits(graph, x)
    changes = dict(change(item) for item in arguments.set)
    print("recipe   agreement   SNR dB  CPU s")
    for recipe in arguments.recipes.split(","):
        start = time.process_time()
        model = quantization.apply(graph, QuantConfig.parse(recipe, **changes), samples, context)
        seconds = time.process_time() - start
        distance = Distance()
        distance.add(logits(model, x), reference)
        agreement = 100 * distance.agreeing / distance.rows
        print(
            f"{recipe:8} {agreement:8.2f}%  {distance.snr_db:7.2f}  {seconds:5.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
