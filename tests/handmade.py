"""A model written by hand: a plan, its kernels in C and its ONNX twin.

It lets the driver, the linker, the bundle and the runners be tested without the compiler.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, checker, helper, numpy_helper

from edgepipe import bundle, bundle_folder, golden_file
from edgepipe.blob import Blob
from edgepipe.bundle import Bundle
from edgepipe.codegen import link
from edgepipe.codegen.plan import Call, KernelAudit, Place, Plan, TensorSpec
from edgepipe.context import Context
from edgepipe.onnx_parts import OnnxParts
from edgepipe.recipe import Recipe
from edgepipe.target import Target

COUNT = 1000
NAMES = ('x "quoted" \\ ??/ é', "count", "y", "twice")

_KERNELS = """
#include <stddef.h>
void @p@_scale_bias(void *x, void *w, void *t) {
    float *xs = x, *ws = w, *ts = t;
    for (int i = 0; i < 1000; i++) ts[i] = xs[i] * ws[i] + ws[1000 + i];
}
void @p@_relu(void *t, void *y) {
    float *ts = t, *ys = y;
    for (int i = 0; i < 1000; i++) ys[i] = ts[i] > 0 ? ts[i] : 0;
}
void @p@_double(void *n, void *m) { *(long long *)m = *(long long *)n * 2; }
"""


@dataclass(frozen=True)
class HandmadeSource:
    """Stands in for importer.Source."""

    name: str
    origin: str
    sha256: str
    reference: OnnxParts


def write(
    destination: Path, source: Any, plan: Plan, objects: Mapping[str, bytes], context: Context,
    prefix: str,
) -> Bundle:  # fmt: skip
    """``bundle.contents`` of a float network, installed."""
    bundle_folder.check_replaceable(destination)
    samples = golden_file.make(source, plan.inputs, [spec.name for spec in plan.outputs])
    files = bundle.contents(source, plan, objects, context, prefix, samples)
    return bundle.install(destination, files)


def weights(seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    w, b = random.standard_normal((2, COUNT)).astype(np.float32)
    return w, b


def plan(prefix: str = "model", seed: int = 7) -> Plan:
    """y = relu(x * w + b) in two calls through the arena; twice = 2 * count beside it."""
    w, b = weights(seed)
    p = Place
    return Plan(
        inputs=(TensorSpec(NAMES[0], (1, COUNT), "float32"), TensorSpec(NAMES[1], (), "int64")),
        outputs=(TensorSpec(NAMES[2], (1, COUNT), "float32"), TensorSpec(NAMES[3], (), "int64")),
        calls=(
            Call(f"{prefix}_scale_bias", (p("input"), p("weights"), p("arena", 64)), "scale"),
            Call(f"{prefix}_relu", (p("arena", 64), p("output")), "relu"),
            Call(f"{prefix}_double", (p("input", index=1), p("output", index=1)), "double"),
        ),
        arena_bytes=64 + 4 * COUNT,
        peak_live_bytes=4 * COUNT,
        weights=Blob((w.tobytes() + b.tobytes(),)),
        audit=(
            KernelAudit("scale", "Mul", "scale_bias", "float32", "float32", COUNT),
            KernelAudit("relu", "Relu", "relu", "float32", "float32", 0),
            KernelAudit("double", "Add", "double", "int64", "int64", 0),
        ),
    )


def source(seed: int = 7) -> HandmadeSource:
    w, b = weights(seed)
    x, n, y, m = NAMES
    graph = helper.make_graph(
        [
            helper.make_node("Mul", [x, "w"], ["xw"]),
            helper.make_node("Add", ["xw", "b"], ["t"]),
            helper.make_node("Relu", ["t"], [y]),
            helper.make_node("Add", [n, n], [m]),
        ],
        "handmade",
        [
            helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, COUNT]),
            helper.make_tensor_value_info(n, TensorProto.INT64, []),
        ],
        [
            helper.make_tensor_value_info(y, TensorProto.FLOAT, [1, COUNT]),
            helper.make_tensor_value_info(m, TensorProto.INT64, []),
        ],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    checker.check_model(model)
    reference = OnnxParts(model.SerializeToString(), {})
    return HandmadeSource("handmade", "handmade.onnx", "0" * 64, reference)


def expected(inputs: dict[str, np.ndarray], seed: int = 7) -> dict[str, np.ndarray]:
    w, b = weights(seed)
    return {NAMES[2]: np.maximum(inputs[NAMES[0]] * w + b, 0), NAMES[3]: inputs[NAMES[1]] * 2}


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.standard_normal((1, COUNT)).astype(np.float32)
    return {NAMES[0]: x, NAMES[1]: np.array(random.integers(-(2**40), 2**40), np.int64)}


def compile_c(
    target: Target, text: str, extra: tuple[str, ...] = (), flags: tuple[str, ...] = ()
) -> bytes:
    """Compile C kernels for ``target`` as the compiler would: a relocatable object, no libc."""
    position = () if target.kind == "wasm" else ("-fPIC",)
    features = "".join(f[0] + f[1:].replace("-", "_") for f in extra)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.c").write_text(text, encoding="utf-8")
        link.zig("cc", "-target", target.link.zig_target, f"-mcpu={link.zig_cpu(target)}{features}",
                 "-O2", "-g0", "-fno-sanitize=all", "-fno-stack-protector", "-ffp-contract=off",
                 *position, *flags, "-c", "kernels.c", "-o", "kernels.o",
                 cwd=Path(folder))  # fmt: skip
        return (Path(folder) / "kernels.o").read_bytes()


def objects(target: Target, prefix: str = "model") -> dict[str, bytes]:
    text = _KERNELS.replace("@p@", prefix)
    plain = {"": compile_c(target, text)}
    return plain | {name: compile_c(target, text, v) for name, v in target.variants.items()}


def context(target: Target) -> Context:
    return Context(target, Recipe())
