"""LiteRT.js, its WebAssembly accelerator, one thread, in a browser, on a .tflite file."""

from __future__ import annotations

from edgepipe.peers import Case, Engine
from edgepipe.peers._web import Web, package
from edgepipe.peers.litert import tflite

RUNNERS = ("browser",)


def missing() -> str:
    """The command that brings it."""
    return "" if package("@litertjs/core") else "npm install @litertjs/core"


def engines(case: Case) -> list[Engine]:
    """The bundle's own ``model.tflite``, or the file that was named. Raises UserError."""
    folder = package("@litertjs/core")
    assert folder is not None
    path = tflite(case)
    web = Web(case, "litert-js", folder, path.read_bytes(), case.inputs, channels_last=True,
              scripts=("@litertjs/core/dist/index.js",), code="wasm/*.wasm")  # fmt: skip
    return [web.engine("LiteRT.js", f", {path.name}")]
