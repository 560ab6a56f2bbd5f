"""Engines from npm, in Node or in a browser, started anew for each round.

They are taken from the nearest ``node_modules`` above the working folder, where ``npm install``
puts them; nothing is bundled along.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import EdgepipeError, UserError
from edgepipe.peers import Case, Engine, Outputs
from edgepipe.runners import _page, node

_TIMEOUT_S = 600.0
_PAGE = b"""<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<script type="importmap">
{"imports": {"@litertjs/wasm-utils": "./modules/@litertjs/wasm-utils/dist/index.js"}}
</script><script type="module" src="web.mjs"></script>"""


def package(name: str) -> Path | None:
    """The folder of an npm package, None where it is not installed."""
    here = Path.cwd()
    found = (folder / "node_modules" / name for folder in (here, *here.parents))
    return next((path for path in found if (path / "package.json").is_file()), None)


@dataclass(frozen=True)
class Web:
    """The model ``model`` in the engine ``kind`` of web.mjs; ``inputs`` in the order of the file,
    ``channels_last`` where its tensors with four axes are so. ``scripts`` are what web.mjs imports,
    ``code`` the WebAssembly that they may fetch: patterns of files beside ``folder``'s own.
    ``build`` is a build of the engine, "" for the one that it chooses."""

    case: Case
    kind: str
    folder: Path
    model: bytes
    inputs: Mapping[str, Any]
    channels_last: bool = False
    scripts: tuple[str, ...] = ()
    code: str = "dist/*.wasm"
    build: str = ""

    def engine(self, title: str, form: str) -> Engine:
        """With its version in its name, and the ``form`` of the model."""
        version = json.loads((self.folder / "package.json").read_text(encoding="utf-8"))["version"]
        in_page = self.case.runner.partition(":")[0] == "browser"
        first = self._first_ms if in_page else None
        return Engine(f"{title} {version}{form}", self._measure, self._outputs, first)

    def _first_ms(self) -> float:
        modules = self._modules()
        code = [f.relative_to(modules).as_posix() for f in sorted(self.folder.glob(self.code))]
        job = {"runs": 0, "warmup": 1, "code": code, "scripts": self.scripts}
        return float(self._run(job)["first_ms"])

    def _modules(self) -> Path:
        """The folder that the packages are in."""
        return self.folder.parents[len(Path(_name(self.folder)).parts) - 1]

    def _measure(self, runs: int, warmup: int) -> tuple[float, float]:
        result = self._run({"runs": runs, "warmup": max(warmup, 20)})  # baseline code comes first
        return float(result["median_ms"]), float(result["min_ms"])

    def _outputs(self) -> Outputs:
        result = self._run({"runs": 1, "warmup": 0})["outputs"]
        tensors = self.case.bundle.outputs
        if not isinstance(result, dict):  # by order
            result = dict(zip((t.name for t in tensors), result, strict=True))
        found = {}
        for t in tensors:
            value = np.asarray(result[t.name], np.float64)
            if self.channels_last and len(t.shape) == 4:
                n, c, h, w = t.shape
                value = value.reshape(n, h, w, c).transpose(0, 3, 1, 2)
            found[t.name] = value
        return found

    def _run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        values = {}
        for name, value in self.inputs.items():
            if value.dtype != np.float32:
                raise UserError(f"input '{name}' is {value.dtype}: web engines are given float32",
                                where=f"--against {self.kind}")  # fmt: skip
            last = self.channels_last and value.ndim == 4
            values[name] = np.ascontiguousarray(value.transpose(0, 2, 3, 1)) if last else value
        shapes = [{"name": n, "shape": v.shape, "file": f"input{i}.bin"}
                  for i, (n, v) in enumerate(values.items())]  # fmt: skip
        files = {f"input{i}.bin": v.tobytes() for i, v in enumerate(values.values())}
        files |= {"model.bin": self.model, "index.html": _PAGE}
        files |= {p.name: p.read_bytes() for p in Path(__file__).parent.glob("*.mjs")}
        modules = self._modules()
        job = {**job, "engine": self.kind, "build": self.build, "inputs": shapes}
        files["job.json"] = json.dumps({**job, "modules": modules.as_uri()}).encode()
        if self.case.runner == "node":
            return _in_node(files)
        program = _page.find(self.case.runner.partition(":")[2])
        assert program is not None  # the bundle has just run in it
        data: dict[str, Any] = json.loads(
            _page.exchange(program, files, {"modules": modules}, _TIMEOUT_S)
        )
        return data


def _name(folder: Path) -> str:
    """The package's name, with its scope."""
    scope = folder.parent.name
    return f"{scope}/{folder.name}" if scope.startswith("@") else folder.name


def _in_node(files: Mapping[str, bytes]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgepipe-peer-") as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        words = [*node.command(), str(Path(name) / "web.mjs")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise EdgepipeError(f"the engine failed in Node: {last}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
