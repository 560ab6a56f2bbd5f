"""A dense layer written by hand, y = x·Wᵀ + b, as a bundle for this machine and as ONNX.

Lets validation, benchmarking and the command line be tested without the compiler, and with
bundles that are wrong on purpose.
"""

from __future__ import annotations

from pathlib import Path

import handmade
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepipe import importer
from edgepipe.blob import Blob
from edgepipe.bundle import Bundle
from edgepipe.codegen.plan import Call, KernelAudit, Place, Plan, TensorSpec
from edgepipe.target import Target

FEATURES, CLASSES = 64, 10

# The sum runs backwards: another order than ONNX Runtime's, as a real compiler's would be.
_KERNEL = """
void model_dense(void *x, void *w, void *y) {
    float *xs = x, *ws = w, *ys = y;
    for (int c = 0; c < 10; c++) {
        float sum = ws[640 + c];
        for (int k = 63; k >= 0; k--) sum += xs[k] * ws[c * 64 + k];
        ys[c] = sum;
    }
}
"""


def weights(cancelling: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """W [10, 64] and b [10]. ``cancelling`` adds terms of that size that cancel for constant x."""
    random = np.random.default_rng(3)
    w = random.standard_normal((CLASSES, FEATURES)).astype(np.float32)
    w += np.float32(cancelling) * np.tile(np.float32([1, -1]), FEATURES // 2)
    return w, random.standard_normal(CLASSES).astype(np.float32)


def save_model(path: Path, w: np.ndarray, b: np.ndarray) -> Path:
    """Write the ONNX model."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["scores"], transB=1)],
        "dense",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


def build(folder: Path, model: Path, w: np.ndarray, b: np.ndarray, name: str = "dense") -> Bundle:
    """A bundle with the weights ``w``, ``b`` that claims to come from ``model``."""
    target = Target.load("host")
    plan = Plan(
        inputs=(TensorSpec("x", (1, FEATURES), "float32"),),
        outputs=(TensorSpec("scores", (1, CLASSES), "float32"),),
        calls=(Call("model_dense", (Place("input"), Place("weights"), Place("output")), "dense"),),
        arena_bytes=64,
        peak_live_bytes=0,
        weights=Blob((w.astype(np.float32).tobytes() + b.astype(np.float32).tobytes(),)),
        audit=(KernelAudit("dense", "Gemm", "dense", "float32", "float32", FEATURES * CLASSES),),
    )
    objects = {"": handmade.compile_c(target, _KERNEL)}
    source = importer.load(model)
    return handmade.write(folder / name, source, plan, objects, handmade.context(target), "model")


def data(count: int = 40, spread: float = 1.0, seed: int = 5) -> np.ndarray:
    """Inputs [count, 64] around 1."""
    noise = np.random.default_rng(seed).standard_normal((count, FEATURES))
    return (1 + spread * noise).astype(np.float32)
