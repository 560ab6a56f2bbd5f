"""Networks × Jetson GPUs without a board: what is compiled, what ptxas reports, what is estimated.

Every kernel is assembled for the board's own GPU; a spill, a PTX ISA above what the board's driver
takes, or a network that does not compile makes the exit code 1. Times are estimates
(edgepipe.roofline), with their assumptions below the table; nothing here is measured.

  jetson.py [--models all|zoo|shared|A,B] [--targets jetson|A,B] [--recipe fp32] [--json FILE]
"""

from __future__ import annotations

import re
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

from edgepipe.bundle import Bundle

HEADERS = [
    *("model", "target", "sm", "PTX", "kernels", "launches", "registers", "spilled bytes"),
    *("one thread", "memory MB", "estimated ms", "slowest kernel (estimate)"),
]


def examine(name: str, model: str, target: str, recipe: str, path: Path) -> dict[str, Any]:
    """Compile one pair and read what its manifest and its PTX say."""
    compiled = compile_apart(model, target, path, "--recipe", recipe)
    result: dict[str, Any] = {"model": name, "target": target}
    if compiled.error:
        return {**result, "error": compiled.error}
    bundle = Bundle.open(path)
    gpu, cuda = bundle.manifest["gpu"], bundle.target.cuda
    assert cuda is not None
    kernels, ops = gpu["kernels"].values(), gpu["estimate"]["ops"]
    (isa,) = re.findall(r"(?m)^\.version (\S+)", bundle.file("model.ptx").read_text("utf-8"))
    slowest = max(ops, key=lambda op: op["us"])
    return {
        **result,
        "sm": cuda.sm,
        "ptx_isa": isa,
        "isa_fits": isa == cuda.ptx_isa,
        "kernels": len(kernels),
        "launches": gpu["launches"],
        "registers": max(k["registers"] for k in kernels),
        "spill_bytes": sum(k["spill_bytes"] for k in kernels),
        "one_thread": sum(k["threads"] == k["blocks"] == [1, 1, 1] for k in kernels),
        "memory_bytes": gpu["memory_bytes"],
        "estimated_ms": gpu["estimate"]["ms"],
        "slowest": f"{slowest['kernel']} {slowest['us'] / 1e3:.2f} ms, {slowest['bound']}",
        "assumptions": gpu["estimate"]["assumptions"],
    }


def fine(result: dict[str, Any]) -> bool:
    """Whether it compiled, without spills and for the board's driver."""
    return "error" not in result and not result["spill_bytes"] and bool(result["isa_fits"])


def row(result: dict[str, Any]) -> list[Any]:
    """The table's line."""
    if "error" in result:
        return [result["model"], result["target"], *["–"] * 9, result["error"]]
    keys = ("model", "target", "sm", "ptx_isa", "kernels", "launches", "registers")
    return [
        *(result[key] for key in (*keys, "spill_bytes", "one_thread")),
        f"{result['memory_bytes'] / 1e6:.1f}",
        f"{result['estimated_ms']:.2f}",
        result["slowest"],
    ]


def main() -> int:
    options = arguments(__doc__, models="all", targets="jetson", recipe="fp32")
    head(
        "Networks × Jetson GPUs: estimates, no measurement", "apache-tvm", "nvidia-cuda-nvrtc-cu12"
    )
    results = []
    with bundle_folder(options.out) as folder:
        for name, model in chosen_models(options.models).items():
            for target in chosen_targets(options.targets):
                path = folder / f"{name}-{target}"
                results.append(examine(name, model, target, options.recipe, path))
                progress("  ".join(map(str, row(results[-1]))))
    finish(HEADERS, list(map(row, results)), results, options.json)
    told = {r["target"]: r["assumptions"] for r in results if "error" not in r}
    print("\n" + "\n".join(f"{target}: {text}" for target, text in told.items()))
    failed = [r for r in results if not fine(r)]
    print(
        f"\n{len(results) - len(failed)} of {len(results)} without spills, for the board's driver"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
