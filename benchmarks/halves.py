"""What halves cost: bundles of fp16 executed on this machine's CPU, against the float32 network.

No GPU takes part: the CUDA source of a bundle is compiled for the CPU (``tests/cuda/stub.py``),
each rounding as on the GPU; how tensor cores round sums is not defined, here they are float32.
Beside it what halves cost any program: the same network in ONNX Runtime with weights and
activations rounded to halves in memory and nothing else, and PyTorch's own halves on the CPU for
networks of the zoo. Inputs are the bundle's golden ones, noise. Minutes for a large network.
Exit code 1 where a bundle stays below 45 dB and more than 3 dB below ONNX Runtime's halves.

  halves.py [--models A,B] [--target jetson-tx2] [--recipe fp16] [--json FILE]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from harness import (
    ROOT,
    arguments,
    bundle_folder,
    chosen_models,
    compile_apart,
    finish,
    head,
    progress,
)
from onnx import TensorProto, helper, numpy_helper

from edgepipe import importer, passes, zoo
from edgepipe.bundle import Bundle
from edgepipe.context import Context
from edgepipe.gpu import VARIABLE
from edgepipe.metrics import Distance
from edgepipe.onnx_parts import OnnxParts
from edgepipe.onnx_session import open_session
from edgepipe.reference import run_session
from edgepipe.validation import validate

MODELS = (
    "digits,fastdepth,mobilenet-v1,mobilenet-v2,vit-tiny,kws_dscnn,ic_resnet8,cifar_resnet20,"
    "vww_mobilenetv1_025,ad_autoencoder"
)
HEADERS = ["model", "weights", "executed dB", "ONNX Runtime's halves dB", "PyTorch's halves dB"]
LEAST_DB, MARGIN_DB = 45.0, 3.0
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: What follows a product in the same kernel, whose input is never in memory.
_FUSED = ("Add", "Clip", "Relu")


def executed_db(bundle: Bundle) -> float:
    """The bundle's kernels on the CPU against its golden outputs."""
    from cuda import stub

    assert bundle.target.cuda is not None
    with tempfile.TemporaryDirectory() as folder:
        source = bundle.file("model.cu").read_text("utf-8")
        os.environ[VARIABLE] = str(stub.executing(source, Path(folder)))
        os.environ |= {"STUB_CAPABILITY": str(bundle.target.cuda.sm), "STUB_DRIVER": "13000"}
        report = validate(bundle, runner="cuda-local")
    return min(output.snr_db for output in report.outputs)


def rounded(model: str, bundle: Bundle) -> onnx.ModelProto:
    """The network with every weight of a product and every value in memory as halves."""
    context = Context(bundle.target, bundle.recipe)
    graph = passes.run(importer.load(model, None).model, context)
    proto = ir.to_proto(graph)
    weights = {t.name: t for t in proto.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes, renamed = [], {}
    for node in proto.graph.node:
        if node.op_type in _PRODUCTS and node.input[1] in weights:
            array = numpy_helper.to_array(weights[node.input[1]])
            half = array.astype(np.float16).astype(np.float32)
            weights[node.input[1]].CopyFrom(numpy_helper.from_array(half, node.input[1]))
        node.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(node)
        out = node.output[0]
        following = readers.get(out, [])
        fused = node.op_type in (*_PRODUCTS, "Add") and len(following) == 1
        if following and not (fused and following[0].op_type in _FUSED) and _is_float(graph, out):
            renamed[out] = f"{out}/rounded"
            half_name = f"{out}/half"
            nodes.append(helper.make_node("Cast", [out], [half_name], to=TensorProto.FLOAT16))
            nodes.append(
                helper.make_node("Cast", [half_name], [renamed[out]], to=TensorProto.FLOAT)
            )
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _is_float(graph: ir.Model, name: str) -> bool:
    values = (v for node in graph.graph.all_nodes() for v in node.outputs)
    return any(v.name == name and v.dtype == ir.DataType.FLOAT for v in values)


def in_memory_db(model: str, bundle: Bundle) -> float:
    """ONNX Runtime with ``rounded``: its kernels add up in float32."""
    inputs, expected = bundle.golden()
    given = {k: v.astype(np.float16).astype(v.dtype) if v.dtype == np.float32 else v
             for k, v in inputs.items()}  # fmt: skip
    session = open_session(OnnxParts.of(rounded(model, bundle).SerializeToString()))
    return least_db(run_session(session, given), expected)


def torch_db(model: str, bundle: Bundle) -> float | None:
    """PyTorch's halves on the CPU; None for what is no module."""
    if model not in zoo.names() or not zoo.describe(model).builder:
        return None
    import torch

    from edgepipe.zoo import weights

    entry, (inputs, expected) = zoo.describe(model), bundle.golden()
    given = [torch.from_numpy(inputs[i.name]) for i in entry.inputs]
    with torch.inference_mode():
        module = weights.built(entry).half()
        results = module(*(t.half() if t.is_floating_point() else t for t in given))
    results = results if isinstance(results, tuple | list) else [results]
    return least_db(
        dict(zip(entry.outputs, (r.float().numpy() for r in results), strict=True)), expected
    )


def least_db(got: Any, expected: Any) -> float:
    """The lowest SNR of the outputs."""
    found = []
    for name, wanted in expected.items():
        distance = Distance()
        distance.add(got[name], wanted)
        found.append(distance.snr_db)
    return min(found)


def measure(name: str, model: str, target: str, recipe: str, path: Path) -> dict[str, Any]:
    """One network, compiled and executed."""
    result: dict[str, Any] = {"model": name, "weights": "trained"}
    if model in zoo.names() and not zoo.describe(model).trained:
        result["weights"] = "random"
    compiled = compile_apart(model, target, path, "--recipe", recipe)
    if compiled.error:
        return {**result, "error": compiled.error}
    bundle = Bundle.open(path)
    memory = in_memory_db(model, bundle)
    return {**result, "memory_db": memory, "torch_db": torch_db(model, bundle),
            "executed_db": executed_db(bundle)}  # fmt: skip


def fine(result: dict[str, Any]) -> bool:
    """Near enough, or as near as halves are."""
    if "error" in result:
        return False
    least = min(LEAST_DB, result["memory_db"] - MARGIN_DB)
    return bool(result["executed_db"] >= least)


def row(result: dict[str, Any]) -> list[Any]:
    """The table's line."""
    if "error" in result:
        return [result["model"], result["weights"], result["error"], "", ""]
    keys = ("executed_db", "memory_db", "torch_db")
    numbers = ["–" if result[key] is None else f"{result[key]:.1f}" for key in keys]
    return [result["model"], result["weights"], *numbers]


def main() -> int:
    options = arguments(__doc__, models=MODELS, target="jetson-tx2", recipe="fp16")
    sys.path.insert(0, str(ROOT / "tests"))
    head(f"Halves on {options.target}, executed on this CPU", "apache-tvm", "torch")
    results = []
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            path = folder / f"{name}-{options.recipe}"
            results.append(measure(name, model, options.target, options.recipe, path))
            progress("  ".join(map(str, row(results[-1]))))
    finish(HEADERS, list(map(row, results)), results, options.json)
    return 0 if all(map(fine, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
