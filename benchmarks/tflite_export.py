"""Trained networks as int8 .tflite files in LiteRT: how large, how near, how much in XNNPACK.

    python benchmarks/tflite_export.py [--models shared|A,B] [--recipe w8a8] [--calibration 256]
                                       [--images 500] [--integers 8] [--json FILE]

Calibration: CIFAR training images, crops of photographs for MobileNetV2, synthetic inputs for the
other networks (whose figures then say how the file follows the graph, and nothing of accuracy).
Figures are of inputs that calibration never saw. LiteRT is compared with the integer interpreter
(the first ``--integers`` runs; in steps of the output's grid, and the share of values that are the
same), with ONNX Runtime on the same Q/DQ graph, and with the float network; "same class" is top-1
agreement with the last two. ONNX Runtime computes the graph's float operators there: its own 8-bit
kernels saturate on processors without VNNI.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import onnx_ir as ir
import onnxruntime
from harness import arguments, chosen_models, finish, head, progress

from edgepipe import importer, passes, quantization
from edgepipe.codegen.plan import TensorSpec
from edgepipe.context import Context
from edgepipe.display import db_text, size_text
from edgepipe.errors import UserError
from edgepipe.golden import synthetic_inputs
from edgepipe.interchange import tflite
from edgepipe.metrics import Distance
from edgepipe.quantization import QuantConfig
from edgepipe.quantization.interpreter import Interpreter
from edgepipe.recipe import Recipe
from edgepipe.target import Target

HEADERS = [
    "network", "inputs", "operators", "XNNPACK", "size", "of float", "steps from integers",
    "equal to integers", "SNR to Q/DQ dB", "SNR to float dB", "same class as Q/DQ", "as float",
    "top-1 change",
]  # fmt: skip

Inputs = dict[str, np.ndarray]


@dataclass
class Data:
    """Inputs of single runs, and labels where there are any."""

    kind: str
    calibration: list[Inputs]
    fresh: list[Inputs]
    labels: np.ndarray | None = None


@dataclass
class Comparison:
    """Accumulates what LiteRT gives for the first output."""

    to_graph: Distance = field(default_factory=Distance)
    to_float: Distance = field(default_factory=Distance)
    steps: list[np.ndarray] = field(default_factory=list)
    winners: list[tuple[int, int]] = field(default_factory=list)

    def add(self, found: np.ndarray, graph: np.ndarray, exact: np.ndarray) -> None:
        """One run."""
        self.to_graph.add(found, graph)
        self.to_float.add(found, exact)
        self.winners.append((int(exact.argmax()), int(found.argmax())))


def data_for(name: str, model: ir.Model, shared: Path, calibration: int, count: int) -> Data:
    """What the table's "inputs" names."""
    key = model.graph.inputs[0].name or ""
    if "resnet" in name:
        from accuracy_cifar import images

        seen, _ = images(shared, "cifar10_train5000", name)
        fresh, labels = images(shared, "cifar10_val2000", name)
        parts = [[{key: x[None]} for x in part] for part in (seen[:calibration], fresh[:count])]
        return Data("CIFAR-10", parts[0], parts[1], labels[:count])
    if name == "mobilenet_v2_224":
        from accuracy_mobilenet import LEFT, RIGHT, crops

        number = min(count, 100)
        seen, fresh = crops(calibration, LEFT, 1), crops(number, RIGHT, 2)
        return Data("crops", [{key: x[None]} for x in seen], [{key: x[None]} for x in fresh])
    specs = [
        TensorSpec(v.name or "", tuple(int(d) for d in v.shape or ()), "float32")
        for v in model.graph.inputs
    ]
    number = min(count, 50)
    runs = [synthetic_inputs(specs, seed) for seed in range(min(calibration, 64) + number)]
    return Data("synthetic", runs[number:], runs[:number])


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    """ONNX Runtime computing what the Q/DQ graph says, and not its own 8-bit kernels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )


def last_step(model: ir.Model) -> float:
    """The scale of the last rounding in front of the first output."""
    node = model.graph.outputs[0].producer()
    while node is not None and node.op_type != "DequantizeLinear":
        node = node.inputs[0].producer()
    assert node is not None
    return float(node.inputs[1].const_value.numpy())


def run(interpreter: Any, feeds: Inputs) -> np.ndarray:
    """The first output; images go in channels last."""
    for detail in interpreter.get_input_details():
        x = feeds[detail["name"]]
        turned = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
        interpreter.set_tensor(detail["index"], np.ascontiguousarray(turned))
    interpreter.invoke()
    found: np.ndarray = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return found


def wholly_delegated(interpreter: Any) -> bool:
    """Whether XNNPACK took every operator, from the inputs to the outputs."""
    plan = interpreter._get_ops_details()
    parts = [node for node in plan if node["op_name"] == "DELEGATE"]
    starts = {detail["index"] for detail in interpreter.get_input_details()}
    ends = {detail["index"] for detail in interpreter.get_output_details()}
    return len(parts) == 1 and starts <= {*parts[0]["inputs"]} and ends <= {*parts[0]["outputs"]}


def measure(name: str, path: str, options: Any, shared: Path) -> dict[str, Any]:
    """Quantize, write, run, compare one network."""
    from ai_edge_litert.interpreter import Interpreter as LiteRt

    context = Context(Target.load("host"), Recipe())
    model = passes.run(importer.load(path).model, context)
    data = data_for(name, model, shared, options.calibration, options.images)
    config = tflite.config(QuantConfig.parse(options.recipe))
    graph = quantization.apply(model, config, data.calibration, context)
    content = tflite.write(graph)
    litert = LiteRt(model_content=content, num_threads=1)
    litert.allocate_tensors()
    plan = litert._get_ops_details()
    exact, rounded = session(model), session(graph)
    integers, output = Interpreter(graph), graph.graph.outputs[0].name or ""
    comparison = Comparison()
    for index, feeds in enumerate(data.fresh):
        found = run(litert, feeds)
        comparison.add(found, rounded.run(None, feeds)[0], exact.run(None, feeds)[0])
        if index < options.integers:
            off = np.abs(found - integers.run(feeds)[output]) / last_step(graph)
            comparison.steps.append(off.ravel())
    off = np.concatenate(comparison.steps)
    result = {
        "network": name,
        "inputs": data.kind,
        "operators": sum(node["op_name"] != "DELEGATE" for node in plan),
        "delegates": sum(node["op_name"] == "DELEGATE" for node in plan),
        "wholly_delegated": wholly_delegated(litert),
        "bytes": len(content),
        "of_float": len(content) / Path(path).stat().st_size,
        "snr_to_graph_db": comparison.to_graph.snr_db,
        "most_steps": float(off.max()),
        "equal": float((off < 0.5).mean()),
        "snr_to_float_db": comparison.to_float.snr_db,
        "class_as_graph": comparison.to_graph.top1_agreement,
        "class_as_float": comparison.to_float.top1_agreement,
    }
    if data.labels is not None:
        winners = np.array(comparison.winners)
        before, after = (winners == data.labels[:, None]).mean(0)
        result |= {"top1_float": before, "top1": after}
    return result


def row(result: dict[str, Any]) -> list[str]:
    """One line of the table."""

    def share(value: float | None) -> str:
        return "–" if value is None or result["inputs"] == "synthetic" else f"{100 * value:.1f}%"

    change = result.get("top1", 0) - result.get("top1_float", 0)
    pieces = result["delegates"]
    return [
        result["network"],
        result["inputs"],
        str(result["operators"]),
        "all" if result["wholly_delegated"] else f"{pieces} parts",
        size_text(result["bytes"]),
        f"{result['of_float']:.3f}",
        f"{result['most_steps']:.1f}",
        f"{100 * result['equal']:.1f}%",
        db_text(result["snr_to_graph_db"]),
        db_text(result["snr_to_float_db"]),
        share(result["class_as_graph"]),
        share(result["class_as_float"]),
        f"{100 * change:+.2f}" if "top1" in result else "–",
    ]


def main() -> None:
    """One line per network."""
    options = arguments(
        __doc__, models="shared", recipe="w8a8", calibration="256", images="500", integers="8"
    )
    shared = Path(os.environ.get("EDGEPIPE_SHARED", Path(__file__).parents[2] / "shared"))
    head(".tflite files in LiteRT", "ai-edge-litert", "numpy")
    results = []
    for name, path in chosen_models(options.models).items():
        progress(name)
        try:
            results.append(measure(name, path, options, shared))
        except UserError as error:
            progress(f"{name}: {error}")
    finish(HEADERS, [row(result) for result in results], results, options.json)


if __name__ == "__main__":
    main()
