"""What a large network costs: peak memory and time of compiling about 300 MB of weights.

The network is made here, He-initialised: convolutions of 512 and 1024 channels and a dense head.
Compiled in a process of its own, after one that warms the caches; each figure beside its limit.
What the interpreter, TVM and LLVM take by themselves is in it: the peak of compiling ``digits``, a
network of 0.1 MB, says how much. Memory is the largest of any one process; the self-check runs in
the same one.

  large_model.py [--megabytes 300] [--targets x86-64-v3] [--recipe fp32] [--external 1]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from harness import arguments, bundle_folder, chosen_targets, compile_apart, finish, head, progress
from onnx import TensorProto, helper, numpy_helper

#: What compiling may take at most: memory in sizes of the model, seconds.
MEMORY_LIMIT, SECONDS_LIMIT = 4.0, 180.0
HEADERS = [
    "target",
    "model MB",
    "peak MB",
    "of which digits' MB",
    "peak, model = 1",
    "seconds",
    "longest stages",
    "limits",
]


def network(megabytes: int, seed: int = 0) -> onnx.ModelProto:
    """Convolutions 3x3 and 1x1 in turn over [1,3,56,56], until their float32 weights have
    ``megabytes`` (1e6 bytes), then a pooled dense layer. He-initialised, so that values neither
    vanish nor overflow."""
    random = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []
    size, name, channels, pixels = 0, "x", 3, 56

    def parameter(shape: tuple[int, ...], fan_in: int) -> str:
        values = random.standard_normal(shape, np.float32) * np.float32((2 / fan_in) ** 0.5)
        weights.append(numpy_helper.from_array(values, f"w{len(weights)}"))
        return str(weights[-1].name)

    while size < megabytes * 1_000_000:
        step = len(nodes) // 2
        kernel = 3 if step % 2 == 0 else 1
        out = 1024 if pixels <= 14 and kernel == 1 else 512
        strides = 2 if step in (1, 3, 5) else 1
        weight = parameter((out, channels, kernel, kernel), channels * kernel**2)
        size += 4 * out * channels * kernel**2
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [name, weight], [f"c{step}"], pads=pads,
                                      strides=[strides] * 2))  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"c{step}"], [f"r{step}"]))
        name, channels, pixels = f"r{step}", out, -(-pixels // strides)
    nodes.append(helper.make_node("GlobalAveragePool", [name], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"]))
    nodes.append(helper.make_node("MatMul", ["flat", parameter((channels, 1000), channels)], ["y"]))
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 56, 56])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1000])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> int:
    options = arguments(__doc__, megabytes="300", targets="x86-64-v3", recipe="fp32", external="0")
    head("Cost of a large network", "apache-tvm", "ziglang")
    rows, results, failed = [], [], False
    with bundle_folder(options.out) as folder, tempfile.TemporaryDirectory() as name:
        path = Path(name) / "large.onnx"
        onnx.save(network(options.megabytes), path, save_as_external_data=bool(options.external))
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        for target in chosen_targets(options.targets):
            chosen = ("--recipe", options.recipe)
            warm = compile_apart("digits", target, folder / f"warm-{target}", *chosen)
            run = compile_apart(str(path), target, folder / f"large-{target}", *chosen)
            longest = sorted(run.stages, key=lambda s: -s["seconds"])[:4]
            times = run.peak_bytes / size
            kept = not run.error and times <= MEMORY_LIMIT and run.seconds <= SECONDS_LIMIT
            failed |= not kept
            rows.append(
                [target, f"{size / 1e6:.0f}", f"{run.peak_bytes / 1e6:.0f}",
                 f"{warm.peak_bytes / 1e6:.0f}", f"{times:.2f}",
                 f"{run.seconds:.1f}",
                 ", ".join(f"{s['stage']} {s['seconds']:.1f}" for s in longest) or run.error,
                 "kept" if kept else "not kept"]
            )  # fmt: skip
            facts = {
                "model_bytes": size, "peak_bytes": run.peak_bytes, "seconds": run.seconds,
                "digits_peak_bytes": warm.peak_bytes,
            }  # fmt: skip
            results.append({"target": target, **facts, "stages": run.stages, "error": run.error})
            progress("  ".join(map(str, rows[-1])))
    finish(HEADERS, rows, results, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
