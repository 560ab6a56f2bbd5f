"""TensorFlow.js, its WebAssembly backend with SIMD, one thread, in Node or in a browser."""

from __future__ import annotations

from edgepipe.peers import Case, Engine
from edgepipe.peers._web import Web, package

RUNNERS = ("node", "browser")
_PACKAGES = ("@tensorflow/tfjs-core", "@tensorflow/tfjs-backend-wasm")


def missing() -> str:
    """The command that brings it."""
    return "" if all(map(package, _PACKAGES)) else f"npm install {' '.join(_PACKAGES)}"


def engines(case: Case) -> list[Engine]:
    """The original model in float32: TensorFlow.js has no integer kernels. Raises UserError."""
    from edgepipe.peers._tfjs_graph import graph_file

    folder = package(_PACKAGES[1])
    assert folder is not None
    model = graph_file(case.reference.source.proto_bytes())
    scripts = ("tfjs-core/dist/tf-core.min.js", "tfjs-backend-wasm/dist/tf-backend-wasm.min.js")
    web = Web(case, "tfjs", folder, model, case.inputs, channels_last=True,
              scripts=tuple(f"@tensorflow/{s}" for s in scripts))  # fmt: skip
    return [web.engine("TensorFlow.js", ", wasm")]
