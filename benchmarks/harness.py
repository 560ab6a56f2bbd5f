"""What the measurements share: models, compiling in a process of its own, tables."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepipe import zoo
from edgepipe.display import table
from edgepipe.machine import machine, one_line, versions
from edgepipe.target import target_names

ROOT = Path(__file__).resolve().parent.parent
#: Networks, data and tools beside the checkout.
SHARED = Path(os.environ.get("EDGEPIPE_SHARED", ROOT.parent / "shared"))


def shared_models() -> dict[str, str]:
    """Trained networks beside the checkout (EDGEPIPE_SHARED, default ../shared): name → path."""
    return {path.stem: str(path) for path in sorted((SHARED / "models").glob("*.onnx"))}


def all_models() -> dict[str, str]:
    """Name → what ``edgepipe compile`` takes, of the zoo and of the shared networks."""
    return {name: name for name in zoo.names()} | shared_models()


def arguments(description: str | None, **defaults: str) -> argparse.Namespace:
    """Parse ``--models``, ``--targets`` (comma-separated), ``--json`` and ``--out``."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        kind = int if default.isdecimal() else str
        told = f"default: {default}".replace("%", "%%")
        parser.add_argument(flag, default=kind(default), type=kind, help=told)
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--out", metavar="DIR", help="keep the bundles there")
    return parser.parse_args()


def chosen_models(text: str) -> dict[str, str]:
    """``all``, ``zoo``, ``shared``, or names and paths separated by commas."""
    known = {"all": all_models, "shared": shared_models}
    if text in known:
        return known[text]()
    if text == "zoo":
        return {name: name for name in zoo.names()}
    models = all_models()
    return {Path(name).stem: models.get(name, name) for name in text.split(",")}


def chosen_targets(text: str) -> list[str]:
    """``all`` (CPUs and WebAssembly), ``jetson`` (their GPUs), or names separated by commas."""
    gpus = [n for n in target_names() if n.startswith("jetson-") and not n.endswith("-cpu")]
    known = {"all": [n for n in target_names() if n not in (*gpus, "cuda")], "jetson": gpus}
    return known.get(text) or text.split(",")


@contextmanager
def bundle_folder(named: str | None) -> Iterator[Path]:
    """``named``, or a temporary folder."""
    if named:
        Path(named).mkdir(parents=True, exist_ok=True)
        yield Path(named)
    else:
        with tempfile.TemporaryDirectory(prefix="edgepipe-bench-") as folder:
            yield Path(folder)


@dataclass(frozen=True)
class Compiled:
    """One ``edgepipe compile`` in a process of its own.

    ``seconds`` is the whole process, from start to exit. ``peak_bytes`` is the largest resident
    size of any one process it started, itself included. ``error`` is what it printed if it failed.
    """

    path: Path
    seconds: float
    peak_bytes: int
    stages: list[dict[str, Any]]
    error: str = ""


def compile_apart(model: str, target: str, path: Path, *options: str) -> Compiled:
    """Compile ``model`` for ``target`` into ``path``, with further ``options``."""
    shim = [sys.executable, "-S", str(Path(__file__).with_name("rusage.py"))]
    command = [sys.executable, "-m", "edgepipe", "compile", model, "--target", target]
    with tempfile.TemporaryDirectory() as folder:
        usage = Path(folder) / "usage.json"
        done = subprocess.run(
            [*shim, str(usage), *command, *options, "-o", str(path), "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        measured = json.loads(usage.read_text(encoding="utf-8"))
    failed = (done.stderr.strip() or "failed")[:300] if measured["code"] else ""
    stages = [] if failed else json.loads(done.stdout)["stages"]
    return Compiled(path, measured["seconds"], measured["peak_bytes"], stages, failed)


def head(title: str, *packages: str) -> None:
    """Print what a number without it is worth nothing."""
    print(f"# {title}\n")
    print(f"{one_line(machine())}  ")
    print(f"{one_line(versions('edgepipe', 'onnxruntime', *packages))}\n", flush=True)


def finish(headers: list[str], rows: list[list[Any]], results: Any, json_file: str | None) -> None:
    """Print the Markdown table and write the results."""
    print(table(headers, rows, markdown=True))
    if json_file:
        document = {
            "machine": machine(),
            "versions": versions("edgepipe", "onnxruntime", "apache-tvm", "ziglang"),
            "results": results,
        }
        Path(json_file).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def progress(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr, flush=True)
