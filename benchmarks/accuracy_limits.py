"""Where a quantized network loses likeness to float: weights, activations and input alone.

    python benchmarks/accuracy_limits.py [--shared DIR] [--networks a,b] [--recipe w8a8]
        [--samples 512] [--images 2000]

1. The network is quantized as ``quantization.apply`` does. Then it is run with some of that only:
   the rounded weights with float activations, rounded activations with float weights, and those
   without the rounding of the input.
2. "per channel" rounds activations with a grid for each channel (its extremes), which no integer
   kernel could. It is given on the very samples that the extremes are of: a sign, though no bound,
   of what shifting ranges between channels (equalisation) can gain.
3. "noise" is white noise of this SNR on the float outputs: how alike the first class can be, at
   that SNR, for outputs with as many near ties as these images have.

Images are those of ``accuracy_cifar.py`` (validation) and ``accuracy_mobilenet.py`` (half
"other", half "unseen"); all figures are against the float network on them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import accuracy_mobilenet
import numpy as np
import onnx_ir as ir
from accuracy_cifar import images

from edgepipe import importer, passes, quantization
from edgepipe.context import Context
from edgepipe.machine import machine, one_line, versions
from edgepipe.metrics import Distance
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.executor import Rounding, Values, compile_part
from edgepipe.quantization.placement import Placement
from edgepipe.recipe import Recipe
from edgepipe.target import Target

NETWORKS = ("cifar_resnet20", "mobilenet_v2_224")
NOISE_DB = (40, 36, 32, 28, 24, 20)
#: Codes of the grids per channel, above the lowest.
LEVELS = 255


def data(shared: Path, network: str, samples: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Calibration samples and other images, preprocessed."""
    if network.startswith("mobilenet"):
        crops, half = accuracy_mobilenet.crops, count // 2
        other = crops(half, accuracy_mobilenet.ALL, 2)
        unseen = crops(half, accuracy_mobilenet.RIGHT, 3)
        return crops(samples, accuracy_mobilenet.LEFT, 1), np.concatenate([other, unseen])
    training = images(shared, "cifar10_train5000", network)[0]
    return training[:samples], images(shared, "cifar10_val2000", network)[0][:count]


class Variants:
    """One quantized network, run in parts."""

    def __init__(self, graph: ir.Graph, rounding: Rounding, inputs: np.ndarray) -> None:
        self.graph, self.rounding, self.inputs = graph, rounding, inputs
        self.placement = rounding.placement

    def run(self, placement: Placement, grids: bool, weights: bool) -> np.ndarray:
        """Outputs [N,classes] with the tensors of ``placement`` and perhaps weights rounded."""
        part = Rounding(
            placement,
            self.rounding.grids if grids else {},
            self.rounding.weights if weights else {},
        )
        return self._outputs(compile_part(placement.units, self.graph.outputs, part).run)

    def _outputs(self, run: Callable[[Values], Values]) -> np.ndarray:
        found = run({self.graph.inputs[0]: self.inputs[:, None]})
        return found[self.graph.outputs[0]].reshape(len(self.inputs), -1)

    def without(self, dropped: set[ir.Value]) -> Placement:
        """The placement with these tensors left in float."""
        kept = {v: n for v, n in self.placement.group.items() if v not in dropped}
        place = self.placement
        return Placement(place.units, kept, place.bits, place.formats, place.integer)

    def lines(self) -> Iterator[tuple[str, np.ndarray]]:
        """Every variant by name."""
        everything = set(self.placement.group)
        yield "as quantized", self.run(self.placement, True, True)
        yield "weights only", self.run(self.without(everything), False, True)
        yield "activations only", self.run(self.placement, True, False)
        entry = self.without({self.graph.inputs[0]})
        yield "the same, float input", self.run(entry, True, False)

    def per_channel(self) -> np.ndarray:
        """Float weights, every tensor of images rounded per channel."""
        values: Values = {self.graph.inputs[0]: self.inputs[:, None]}
        self._round(values)
        for index, unit in enumerate(self.placement.units):
            outputs = [v for v in unit.nodes[-1].outputs if v.uses() or v.is_graph_output()]
            found = compile_part([unit], outputs, None).run(values)
            self._round(found)
            rest = self.placement.units[index + 1 :]
            needed = {v for later in rest for node in later.nodes for v in node.inputs}
            values = {
                v: a for v, a in {**values, **found}.items() if v in needed or v.is_graph_output()
            }
        return values[self.graph.outputs[0]].reshape(len(self.inputs), -1)

    def _round(self, values: Values) -> None:
        """Round in place what is quantized."""
        for value, array in values.items():
            if value not in self.placement.group:
                continue
            if array.ndim < 4:
                values[value] = self.rounding.grid(value).round(array)
                continue
            axes = tuple(i for i in range(array.ndim) if i != 2)
            low = np.minimum(array.min(axes, keepdims=True), 0)
            high = np.maximum(array.max(axes, keepdims=True), 0)
            scale = np.maximum((high - low) / LEVELS, 1e-9)
            zero = np.rint(-low / scale)
            codes = np.clip(np.rint(array / scale) + zero, 0, LEVELS)
            values[value] = ((codes - zero) * scale).astype(np.float32)


def compared(name: str, found: np.ndarray, reference: np.ndarray) -> str:
    """One line."""
    distance = Distance()
    distance.add(found, reference)
    return f"  {name:32} {distance.snr_db:7.2f}  {100 * distance.agreeing / distance.rows:8.2f}%"


def network_lines(network: str, arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of one network."""
    samples, x = data(arguments.shared, network, arguments.samples, arguments.images)
    context = Context(Target.load("host"), Recipe())
    source = importer.load(arguments.shared / "models" / f"{network}.onnx", None)
    graph = passes.run(source.model, context)
    name = graph.graph.inputs[0].name
    config = QuantConfig.parse(arguments.recipe)
    stream = ({name: sample[None]} for sample in samples)
    fitted, rounding = quantization.fit(graph, config, stream, context)
    variants = Variants(fitted.graph, rounding, x)
    reference = variants.run(variants.without(set(rounding.placement.group)), False, False)
    yield f"{network} {arguments.recipe}, {len(samples)} samples, {len(x)} images"
    for title, found in variants.lines():
        yield compared(title, found, reference)
    seen = Variants(fitted.graph, rounding, samples[: arguments.per_channel])
    wanted = seen.run(seen.without(set(rounding.placement.group)), False, False)
    tensor = seen.run(rounding.placement, True, False)
    yield compared("activations only, on samples", tensor, wanted)
    yield compared("the same, per channel", seen.per_channel(), wanted)
    generator = np.random.default_rng(0)
    power = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    for level in NOISE_DB:
        noise = generator.standard_normal(reference.shape) * power * 10 ** (-level / 20)
        yield compared(f"noise {level} dB", (reference + noise).astype(np.float32), reference)


def main() -> None:
    """Print the table of every network."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shared", type=Path, default=Path(os.environ.get("EDGEPIPE_SHARED", "../shared"))
    )
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--per-channel", type=int, default=64, metavar="SAMPLES")
    arguments = parser.parse_args()
    print(one_line(machine()))
    print(one_line(versions("edgepipe", "onnxruntime", "numpy", "onnx-ir")))
    print(f"  {'':32}  SNR dB  agreement", flush=True)
    for network in arguments.networks.split(","):
        for line in network_lines(network, arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
