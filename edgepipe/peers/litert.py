"""LiteRT (TensorFlow Lite) with XNNPACK on a .tflite file of the model."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import UserError
from edgepipe.machine import versions
from edgepipe.peers import Case, Engine, Outputs, timed

RUNNERS = ("local",)


def missing() -> str:
    """The package that brings it."""
    there = importlib.util.find_spec("ai_edge_litert")
    return "" if there else "pip install 'edgepipe[litert]'"


def engines(case: Case) -> list[Engine]:
    """The bundle's own ``model.tflite``, or the file that was named. Raises UserError."""
    from ai_edge_litert.interpreter import Interpreter

    path = tflite(case)
    try:
        interpreter = Interpreter(model_path=str(path), num_threads=case.threads)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        said = " ".join(str(error).split())[:160]
        raise UserError(f"LiteRT refuses the file: {said}", where=str(path)) from None
    details = interpreter.get_input_details()
    for detail, value in zip(details, _given(case, details, path), strict=True):
        interpreter.set_tensor(detail["index"], value)
    name = f"LiteRT {versions('ai-edge-litert')['ai-edge-litert']}, {path.name}"
    return [Engine(name, timed(interpreter.invoke), partial(_outputs, case, interpreter))]


def tflite(case: Case) -> Path:
    """The file that was named, or the bundle's own. Raises UserError where there is neither."""
    if case.file is not None:
        return case.file
    if "model.tflite" in case.bundle.manifest["files"]:
        return case.bundle.file("model.tflite")
    fix = "compile w8a8 with --emit tflite, or name a file: litert=FILE.tflite"
    raise UserError("the bundle has no model.tflite", where="--against litert", fix=fix)


def _given(case: Case, details: list[dict[str, Any]], path: Path) -> list[Any]:
    """The golden inputs, by name where the file keeps it, channels last where it wants them so."""
    if len(details) != len(case.inputs):
        what = f"has {len(details)} inputs, the bundle {len(case.inputs)}"
        raise UserError(what, where=str(path))
    names = [d["name"].removeprefix("serving_default_").split(":")[0] for d in details]
    if set(names) != set(case.inputs):
        names = list(case.inputs)  # converters rename: by order then
    return [
        _fitted(case.inputs[name], detail, path)
        for name, detail in zip(names, details, strict=True)
    ]


def _fitted(value: Any, detail: dict[str, Any], path: Path) -> Any:
    shape, kind = tuple(int(d) for d in detail["shape"]), np.dtype(detail["dtype"])
    last = value.transpose(0, 2, 3, 1) if value.ndim == 4 and value.shape != shape else value
    if last.shape != shape or last.dtype != kind:
        raise UserError(f"takes {kind} {list(shape)}, the bundle {value.dtype} "
                        f"{list(value.shape)}", where=str(path))  # fmt: skip
    return np.ascontiguousarray(last)


def _outputs(case: Case, interpreter: Any) -> Outputs:
    interpreter.invoke()
    results = {}
    details = interpreter.get_output_details()
    for tensor, detail in zip(case.bundle.outputs, details, strict=False):
        value = interpreter.get_tensor(detail["index"])
        if value.ndim == 4 and value.shape != tensor.shape:
            value = value.transpose(0, 3, 1, 2)
        results[tensor.name] = value
    return results
