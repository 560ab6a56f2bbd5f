"""Instructions per inference beside other engines' AArch64 builds, counted by QEMU: no latency.

engines_arm.py [--models mobilenet-v1,mobilenet-v2] [--recipes fp32,w8a8] [--cores cortex-a72,…]

The engines' published wheels for AArch64 run in QEMU as it emulates a core, with a Debian for that
architecture below them, unpacked once (hundreds of MB): LiteRT on a .tflite file, ONNX Runtime on
the original or the Q/DQ model, ncnn on the original in float32. Each gets the golden input of the
bundle; "same" is the correlation of what it computes with what the bundle does. Files of .tflite
that lie beside the checkout (EDGEPIPE_SHARED) have weights of their own: only their architecture
is the same, and nothing is compared. ONNX Runtime's count moves by ten millions and more from run
to run: of small networks it says nothing. Weights are He-initialised.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import instructions
import ncnn_guest
import numpy as np
from engines import built, tflite_file
from harness import (
    ROOT,
    arguments,
    bundle_folder,
    chosen_models,
    finish,
    head,
    progress,
)

from edgepipe.bundle import Bundle
from edgepipe.errors import UserError
from edgepipe.machine import versions
from edgepipe.peers import Case
from edgepipe.peers.ncnn import convert

HEADERS = ["model", "core", "format", "ratio to the best", "edgepipe M", "engines M, same"]
#: The target whose code a core runs best.
TARGETS = {"cortex-a72": "raspberry-pi-4", "cortex-a76": "raspberry-pi-5"}
#: Repetitions whose counts are subtracted. ONNX Runtime's moves by millions from start to start.
FEW, MANY = 1, {"litert": 3, "ncnn": 3, "ort": 9}


@dataclass(frozen=True)
class Count:
    """Instructions per inference of one engine, and how far its output is that of the bundle."""

    engine: str
    instructions: float
    same: float | None

    def __str__(self) -> str:
        told = "" if self.same is None else f", {self.same:.4f}"
        return f"{self.engine} {self.instructions / 1e6:.1f}{told}"


class Engines:
    """The engines' wheels over an AArch64 Debian, as ``tools/peers_arm.py`` sets them up; ncnn's
    beside them."""

    def __init__(self) -> None:
        self.tool = instructions.tool("peers_arm")
        self.lab = self.tool.Peers(instructions.CACHE)
        self.lab.setup()
        self.ncnn = versions("ncnn")["ncnn"]
        if not (self.lab.site / f"ncnn-{self.ncnn}.dist-info").exists():
            wheels = self.lab.work / f"ncnn-{self.ncnn}"
            platforms = [word for name in self.tool.PLATFORMS for word in ("--platform", name)]
            self.tool.pip("download", "-q", "--no-deps", "--only-binary=:all:", "--implementation",
                          "cp", "--python-version", "3.11", *platforms, "-d", wheels,
                          f"ncnn=={self.ncnn}")  # fmt: skip
            for file in wheels.glob("*.whl"):
                zipfile.ZipFile(file).extractall(self.lab.site)

    def count(self, engine: str, model: Path, core: str, bundle: Bundle, compare: bool) -> Count:
        """Raises RuntimeError with what the engine said where it fails."""
        golden, expected = bundle.golden()
        (given,), wanted = golden.values(), next(iter(expected.values()))
        with tempfile.TemporaryDirectory() as name:
            x, y = Path(name) / "x.npy", Path(name) / "y.npy"
            np.save(x, given)
            counts = []
            for times in (FEW, MANY[engine]):
                if engine == "ncnn":
                    counts.append(self._ncnn(core, model, x, y, times))
                else:
                    counts.append(self.lab.guest(engine, core, model, x, y, times)[0])
            found = np.load(y)
        same = float(np.corrcoef(found.ravel(), wanted.ravel())[0, 1]) if compare else None
        version = self.ncnn
        if engine != "ncnn":
            version = self.tool.WHEELS[self.tool.ENGINES[engine][0]]
        per_inference = (counts[1] - counts[0]) / (MANY[engine] - FEW)
        return Count(f"{engine} {version}", per_inference, same)

    def _ncnn(self, core: str, model: Path, x: Path, y: Path, times: int) -> int:
        libraries = ":".join(f"{top}/lib/aarch64-linux-gnu" for top in ("", "/usr"))
        environment = {"PYTHONHOME": self.lab.sysroot / "usr", "PYTHONHASHSEED": 0,
                       "PYTHONPATH": f"{self.lab.site}:{ROOT}", "PYTHONDONTWRITEBYTECODE": 1,
                       "LD_LIBRARY_PATH": libraries, "OMP_NUM_THREADS": 1}  # fmt: skip
        words = [self.lab.sysroot / "usr/bin/python3.11", ncnn_guest.__file__, model, x, y, times]
        return int(self.lab.run(words, core, self.lab.root(core), environment)[0])


def forms(
    name: str, recipe: str, bundle: Bundle, model: str, folder: Path
) -> dict[str, tuple[Path, bool]]:
    """Engine → the file it reads, and whether it has the weights of the bundle."""
    case = Case(bundle, model)
    made = folder / f"{name}-{recipe}"
    made.mkdir(exist_ok=True)
    file = tflite_file(name, recipe)
    found: dict[str, tuple[Path, bool]] = {"litert": (file, False)} if file else {}
    if not file and "model.tflite" in bundle.manifest["files"]:
        found["litert"] = (bundle.file("model.tflite"), True)
    *_, onnx = case.onnx_forms().values()
    (made / "model.onnx").write_bytes(onnx)
    found["ort"] = (made / "model.onnx", True)
    if recipe == "fp32":
        try:
            convert(onnx, made)
            found["ncnn"] = (made, True)
        except UserError as error:
            progress(f"{name}: {error}")
    return found


def counted(
    engines: Engines, files: dict[str, tuple[Path, bool]], core: str, bundle: Bundle
) -> Iterator[Count]:
    """Of each engine; what fails is said and left out."""
    for engine, (file, own) in files.items():
        try:
            count = engines.count(engine, file, core, bundle, own)
        except RuntimeError as error:
            progress(f"{core} {engine}: {str(error)[-300:]}")
            continue
        progress(f"{core} {count}")
        if count.instructions > 0:  # else its start varies by more than the network takes
            yield count


def main() -> int:
    options = arguments(__doc__, models="mobilenet-v1,mobilenet-v2", recipes="fp32,w8a8",
                        cores="cortex-a72,cortex-a76")  # fmt: skip
    head("Instructions per inference beside other engines, counted by QEMU: no latency")
    print("ratio: to the engine with the fewest; below 1 edgepipe has fewer\n", flush=True)
    engines = Engines()
    rows: list[list[Any]] = []
    results: list[dict[str, Any]] = []
    wanted = product(chosen_models(options.models).items(), options.recipes.split(","),
                     options.cores.split(","))  # fmt: skip
    with bundle_folder(options.out) as folder:
        for (name, model), recipe, core in wanted:
            bundle = built(name, model, TARGETS[core], recipe, folder)
            ours = instructions.count(bundle)
            files = forms(name, recipe, bundle, model, folder)
            counts = list(counted(engines, files, core, bundle))
            best = min((count.instructions for count in counts), default=0.0)
            ratio = f"{ours / best:.3f}" if best else "–"
            told = "; ".join(map(str, counts))
            rows.append([name, core, recipe, ratio, f"{ours / 1e6:.1f}", told])
            results.append({"model": name, "core": core, "recipe": recipe, "instructions": ours,
                            "engines": [vars(count) for count in counts]})  # fmt: skip
            progress("  ".join(rows[-1]))
    finish(HEADERS, rows, results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
