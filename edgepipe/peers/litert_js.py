"""LiteRT.js, its WebAssembly accelerator, one thread, in a browser, on a .tflite file."""

from __future__ import annotations

from dataclasses import replace

from edgepipe.peers import Case, Engine
from edgepipe.peers._web import Web, package
from edgepipe.peers.litert import tflite

RUNNERS = ("browser",)
#: The build without relaxed SIMD.
_PLAIN = "litert_wasm_compat_internal.js"


def missing() -> str:
    """The command that brings it."""
    return "" if package("@litertjs/core") else "npm install @litertjs/core"


def engines(case: Case) -> list[Engine]:
    """The bundle's own ``model.tflite``, or the file that was named. Raises UserError.

    Beside a bundle without relaxed SIMD stands the engine's build without it, too: what it takes
    where a browser has none.
    """
    folder = package("@litertjs/core")
    assert folder is not None
    path = tflite(case)
    web = Web(case, "litert-js", folder, path.read_bytes(), case.inputs, channels_last=True,
              scripts=("@litertjs/core/dist/index.js",), code="wasm/*.wasm")  # fmt: skip
    found = [web.engine("LiteRT.js", f", {path.name}")]
    if not case.bundle.target.variants and (folder / "wasm" / _PLAIN).is_file():
        found.append(replace(web, build=_PLAIN).engine("LiteRT.js", f", plain SIMD, {path.name}"))
    return found
