"""Latency in Node (V8, the engine of Chromium): edgepipe against onnxruntime-web, in turn.

One process loads both, one thread each, the same inputs. onnxruntime-web comes from npm into a
cache outside the checkout, at the version pinned here.

  latency_node.py [--models mobilenet-v1,…] [--targets wasm-simd] [--runs 100] [--json FILE]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
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

from edgepipe import runners
from edgepipe.benchmark import Latency
from edgepipe.bundle import Bundle
from edgepipe.errors import UserError
from edgepipe.reference import open_reference

ORT_WEB = "1.30.0"
#: Below this the two do not compute the same, and comparing times is idle.
LEAST_SNR_DB = 60.0
HEADERS = [
    "model",
    "target",
    "ratio",
    "edgepipe ms",
    "min",
    "spread",
    "ort-web ms",
    "min",
    "spread",
]


def ort_web() -> Path:
    """The folder with onnxruntime-web, installed when it is not there."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgepipe"
    folder = cache / f"onnxruntime-web-{ORT_WEB}"
    if not (folder / "node_modules" / "onnxruntime-web").is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise UserError("npm is not installed", fix="apt-get install npm")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        progress(f"npm install onnxruntime-web@{ORT_WEB}")
        options = ["--no-audit", "--no-fund", "--silent", "--save-exact"]
        subprocess.run(
            [npm, "install", *options, f"onnxruntime-web@{ORT_WEB}"], cwd=folder, check=True
        )
    return folder


def measure(bundle: Bundle, model: str, ort: Path, runs: int) -> dict[str, Any]:
    """Medians and minima per round of both engines in one Node process."""
    inputs, _ = bundle.golden()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.onnx").write_bytes(open_reference(bundle, model).source.proto_bytes())
        files = {}
        for i, (tensor, value) in enumerate(inputs.items()):
            if value.dtype != "float32":
                raise UserError(f"input '{tensor}' is {value.dtype}; only float32 is timed here")
            (folder / f"input{i}.bin").write_bytes(value.tobytes())
            files[tensor] = {"shape": list(value.shape), "file": str(folder / f"input{i}.bin")}
        job = {
            "bundle": str(bundle.path),
            "model": str(folder / "model.onnx"),
            "ort": str(ort),
            "runs": runs,
            "rounds": 5,
            "inputs": files,
        }
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        script = Path(__file__).with_suffix(".mjs")
        node = runners.get("node").command(bundle.target)  # type: ignore[attr-defined]
        done = subprocess.run(
            [*node, str(script), str(folder / "job.json")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise UserError(f"Node failed: {done.stderr.strip()[-300:]}")
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        if result["snr_db"] < LEAST_SNR_DB:
            raise UserError(f"the engines disagree: SNR {result['snr_db']:.1f} dB")
        return result


def row(name: str, target: str, raw: dict[str, Any]) -> list[str]:
    """The table's line."""
    ours = Latency.of("edgepipe", raw["ours"]["medians"], raw["ours"]["minima"])
    peer = Latency.of("onnxruntime-web", raw["ort"]["medians"], raw["ort"]["minima"])
    cells = [
        text
        for engine in (ours, peer)
        for text in (
            f"{engine.median_ms:.2f}",
            f"{engine.min_ms:.2f}",
            f"{engine.low_ms:.2f}–{engine.high_ms:.2f}",
        )
    ]
    variant = f"{target} ({raw['ours']['variant']})"
    return [name, variant, f"{ours.median_ms / peer.median_ms:.2f}", *cells]


def main() -> int:
    options = arguments(
        __doc__, models="mobilenet-v1,mobilenet-v2,resnet18", targets="wasm-simd", runs="100"
    )
    ort = ort_web()
    head("Latency in Node, one thread")
    node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True)
    print(f"node {node.stdout.strip()}, onnxruntime-web {ORT_WEB} (wasm, 1 thread)\n")
    print("ratio: median over onnxruntime-web's median in the same process\n")
    rows, results, failed = [], [], False
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for target in chosen_targets(options.targets):
                compiled = compile_apart(model, target, folder / f"{name}-{target}")
                if compiled.error:
                    failed = True
                    rows.append([name, target, *["–"] * 6, compiled.error])
                    continue
                raw = measure(Bundle.open(compiled.path), model, ort, options.runs)
                rows.append(row(name, target, raw))
                results.append({"model": name, "target": target, **raw})
                progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
