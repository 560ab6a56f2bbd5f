"""onnxruntime-web, its WebAssembly provider, one thread, in Node or in a browser."""

from __future__ import annotations

from edgepipe.peers import Case, Engine
from edgepipe.peers._web import Web, package

RUNNERS = ("node", "browser")
_SCRIPTS = ("onnxruntime-web/dist/ort.wasm.min.mjs",)
_CODE = "dist/ort-wasm-simd-threaded.wasm"


def missing() -> str:
    """The command that brings it."""
    return "" if package("onnxruntime-web") else "npm install onnxruntime-web"


def engines(case: Case) -> list[Engine]:
    """The original model, and the Q/DQ model. Raises UserError."""
    folder = package("onnxruntime-web")
    assert folder is not None
    return [
        Web(case, "ort-web", folder, model, case.inputs, scripts=_SCRIPTS, code=_CODE).engine(
            "onnxruntime-web", form
        )
        for form, model in case.onnx_forms().items()
    ]
