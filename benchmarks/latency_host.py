"""Latency on this machine's CPU: edgepipe against ONNX Runtime, one thread each, in turn.

latency_host.py [--models mobilenet-v1,…] [--targets host] [--runs 200] [--json FILE]
"""

from __future__ import annotations

import sys

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

from edgepipe.benchmark import bench
from edgepipe.bundle import Bundle

HEADERS = [
    "model",
    "target",
    "ratio",
    "edgepipe ms",
    "min",
    "spread",
    "ONNX Runtime ms",
    "min",
    "spread",
]
MODELS = "mobilenet-v1,mobilenet-v2,resnet18,squeezenet-v1-1,efficientnet-b0,digits"


def main() -> int:
    options = arguments(__doc__, models=MODELS, targets="host", runs="200")
    head("Latency on this machine, one thread")
    print("ratio: median over ONNX Runtime's median in the same run; below 1 edgepipe is faster\n")
    rows, results, failed = [], [], False
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for target in chosen_targets(options.targets):
                compiled = compile_apart(model, target, folder / f"{name}-{target}")
                if compiled.error:
                    failed = True
                    rows.append([name, target, *["–"] * 6, compiled.error])
                    continue
                bundle = Bundle.open(compiled.path)
                result = bench(bundle, runs=options.runs, against=("ort",), model=model)
                (ratio,), (peer,) = result.ratios.values(), result.peers
                cells = [
                    text
                    for engine in (result.ours, peer)
                    for text in (
                        f"{engine.median_ms:.3f}",
                        f"{engine.min_ms:.3f}",
                        f"{engine.low_ms:.3f}–{engine.high_ms:.3f}",
                    )
                ]
                rows.append([name, target, f"{ratio:.2f}", *cells])
                results.append({"model": name, "target": target, **result.to_json()})
                progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
