"""Files of other formats that a bundle carries along: the quantized model for other engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgepipe.context import Context
from edgepipe.errors import UserError, did_you_mean
from edgepipe.quantize import Quantized
from edgepipe.recipe import Recipe

#: What ``--emit`` takes → the file in the bundle.
FILES = {"onnx": "model.qdq.onnx", "tflite": "model.tflite"}


def check(kinds: Sequence[str], recipe: Recipe) -> None:
    """Refuse what cannot be emitted, before any work. Raises UserError."""
    for kind in kinds:
        if kind not in FILES:
            raise UserError(
                f"unknown format '{kind}'", where="--emit", fix=did_you_mean(kind, FILES)
            )
    if kinds and not recipe.quantizes:
        raise UserError(
            f"recipe '{recipe}' makes no quantized model to emit",
            where="--emit",
            fix="give a quantized recipe, such as w8a8",
        )
    if "tflite" in kinds and not recipe.integer:
        raise UserError(
            f"recipe '{recipe}' computes in float, a .tflite file in integers",
            where="--emit tflite",
            fix="give w8a8 or w4a8",
        )


def files(kinds: Sequence[str], quantized: Quantized | None, context: Context) -> dict[str, bytes]:
    """File name → content. Raises UserError where a format cannot hold the model."""
    found: dict[str, bytes] = {}
    if quantized is None:
        return found
    if "onnx" in kinds:
        found[FILES["onnx"]] = quantized.reference
    if "tflite" in kinds:
        found[FILES["tflite"]] = _tflite(quantized, context)
    return found


def _tflite(quantized: Quantized, context: Context) -> bytes:
    """The format wants a rounding behind every operator, and computes with all 8-bit weights."""
    from edgepipe.interchange import tflite

    context.progress("quantizing for .tflite")
    graph = quantized.again(lambda config: tflite.config(replace(config, weight_limit=127)))
    return tflite.write(graph)
