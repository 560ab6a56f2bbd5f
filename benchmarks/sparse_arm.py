"""Sparse beside dense in instructions per inference on ARM, counted by QEMU: no latency.

sparse_arm.py [--recipes 80%,90%,w8a8,w8a8+80%b1x4] [--cores cortex-a72,cortex-a76]

MobileNetV1-224 with random masks on all pointwise convolutions, as ``sparse_latency.py`` makes it.
Beside it LiteRT's AArch64 build on files of the same architecture that lie beside the checkout
(EDGEPIPE_SHARED): dense in the same format, and with weights stored sparse where there is such a
file.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

import instructions
from engines import tflite_file
from engines_arm import TARGETS, Engines
from harness import SHARED, arguments, bundle_folder, finish, head, progress
from sparse_latency import DENSE, MODEL, compiled, format_of

HEADERS = ["core", "recipe", "to dense fp32", "to LiteRT", "edgepipe M", "LiteRT M", "its file"]


def peer(name: str) -> Path | None:
    """The .tflite file that ``name`` is measured beside, if it is there."""
    stem = MODEL.replace("-", "_")
    sparse = SHARED / "peers" / f"{stem}_sparse{name.rstrip('%')}.tflite"
    return sparse if sparse.is_file() else tflite_file(MODEL, format_of(name))


def main() -> int:
    options = arguments(__doc__, recipes="80%,90%,w8a8,w8a8+80%b1x4",
                        cores="cortex-a72,cortex-a76")  # fmt: skip
    head(
        "Sparse pointwise convolutions of MobileNetV1-224, instructions counted by QEMU: no latency"
    )
    engines = Engines()
    rows: list[list[Any]] = []
    results: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    counted: dict[tuple[str, Path], float] = {}
    with bundle_folder(options.out) as folder:
        for core, name in product(options.cores.split(","), [DENSE, *options.recipes.split(",")]):
            bundle = compiled(name, TARGETS[core], folder).bundle
            ours = instructions.count(bundle)
            dense.setdefault(core, ours)
            file = peer(name)
            if file is not None and (core, file) not in counted:
                count = engines.count("litert", file, core, bundle, compare=False)
                counted[core, file] = count.instructions
            theirs = None if file is None else counted[core, file]
            rows.append([core, name, f"{ours / dense[core]:.3f}",
                         f"{ours / theirs:.3f}" if theirs else "–", f"{ours / 1e6:.1f}",
                         f"{theirs / 1e6:.1f}" if theirs else "–",
                         file.name if file else "–"])  # fmt: skip
            results.append({"core": core, "recipe": name, "instructions": ours, "litert": theirs})
            progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
