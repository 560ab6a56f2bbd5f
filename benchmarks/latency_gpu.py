"""Latency on this machine's NVIDIA GPU: a board's own PTX against PyTorch with cuDNN, in turn.

Each bundle is compiled for a board, checked against ONNX Runtime on this GPU, and measured in turn
with the same network in PyTorch: channels last, one CUDA graph, in halves where the recipe says so.
Without a torch for this GPU (it says so) the bundles are checked and measured alone.
Exit code 1 where a bundle is not near enough (float32 100 dB, halves 45 dB) or slower than what is
aimed at (0.9 of PyTorch's time, ResNet50 1.3); 2, with one line, without a GPU.

  pip install -e '.[cuda,torch]' and a torch for the driver's CUDA, on a machine with an NVIDIA GPU
  latency_gpu.py [--models A,B] [--targets jetson-tx2,cuda] [--recipes fp32,fp16] [--runs 200]
                 [--json FILE] [--out DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from harness import (
    arguments,
    bundle_folder,
    chosen_models,
    chosen_targets,
    compile_apart,
    finish,
    head,
    progress,
)

from edgepipe import gpu
from edgepipe.benchmark import bench
from edgepipe.bundle import Bundle
from edgepipe.peers import torch_cuda
from edgepipe.validation import validate

MODELS = "mobilenet-v1,mobilenet-v2,fastdepth,resnet50"
HEADERS = [
    *("model", "target", "recipe", "SNR dB", "ratio", "aim", "edgepipe ms", "kernels ms"),
    *("PyTorch ms", "agreement dB", "engine"),
]
LEAST_SNR_DB = {"fp32": 100.0, "fp16": 45.0}
#: Time that is aimed at, PyTorch's = 1.
MOST, OTHERS = {"resnet50": 1.3}, 0.9


def measure(name: str, model: str, target: str, recipe: str, path: Path, runs: int) -> Any:
    """One network: compiled, checked, measured."""
    result: dict[str, Any] = {"model": name, "target": target, "recipe": recipe}
    compiled = compile_apart(model, target, path, "--recipe", recipe)
    if compiled.error:
        return {**result, "error": compiled.error}
    bundle = Bundle.open(path)
    report = validate(bundle, runner="cuda-local", min_snr_db=LEAST_SNR_DB[recipe])
    against = () if torch_cuda.missing() else ("torch-cuda",)
    found = bench(bundle, runner="cuda-local", runs=runs, against=against, model=model)
    assert found.timing is not None
    result |= {
        "snr_db": min(output.snr_db for output in report.outputs),
        "right": report.ok,
        "aim": MOST.get(name, OTHERS),
        "edgepipe_ms": found.ours.median_ms,
        "kernels_ms": found.timing.board["kernels_p50_ms"],
    }
    for peer in found.peers:
        result |= {
            "ratio": found.ours.median_ms / peer.median_ms,
            "peer_ms": peer.median_ms,
            "agreement_db": peer.snr_db,
            "engine": peer.engine,
        }
    return result


def fine(result: dict[str, Any]) -> bool:
    """Near enough and quick enough; the aim is for halves."""
    if "error" in result or not result["right"]:
        return False
    return result["recipe"] != "fp16" or bool(result.get("ratio", 0) <= result["aim"])


def row(result: dict[str, Any]) -> list[Any]:
    """The table's line."""
    first = [result["model"], result["target"], result["recipe"]]
    if "error" in result:
        return [*first, *["–"] * 7, result["error"]]
    keys = ("snr_db", "ratio", "aim", "edgepipe_ms", "kernels_ms", "peer_ms", "agreement_db")
    numbers = [f"{result[key]:.3g}" if key in result else "–" for key in keys]
    return [*first, *numbers, result.get("engine", "–")]


def main() -> int:
    options = arguments(
        __doc__, models=MODELS, targets="jetson-tx2,cuda", recipes="fp32,fp16", runs="200"
    )
    found = gpu.detect()
    if isinstance(found, str):
        print(f"nothing measured: {found}; it takes an NVIDIA GPU", file=sys.stderr)
        return 2
    head("Latency on this GPU, in turn with PyTorch", "torch", "nvidia-cuda-nvrtc-cu12")
    results = []
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for target in chosen_targets(options.targets):
                for recipe in options.recipes.split(","):
                    path = folder / f"{name}-{target}-{recipe}"
                    results.append(measure(name, model, target, recipe, path, options.runs))
                    progress("  ".join(map(str, row(results[-1]))))
    finish(HEADERS, list(map(row, results)), results, options.json)
    print(f"\n{found.name}, sm_{found.sm}, driver {found.driver[0]}.{found.driver[1]}")
    if missing := torch_cuda.missing():
        print(f"not compared with PyTorch: {missing}")
    return 0 if all(map(fine, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
