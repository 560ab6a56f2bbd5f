"""The importer: an ONNX file, a torch module, a ``.pt2`` program or a zoo name becomes a Source.

Heavy packages (onnx, onnx_ir, torch) are imported when a model is loaded, not before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe import zoo
from edgepipe.errors import UserError, did_you_mean
from edgepipe.importer.judge import judged

if TYPE_CHECKING:
    from edgepipe.importer.source import Source

__all__ = ["judged", "load"]

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")

# Formats people have at hand that are not programs edgepipe can read, and the way out.
_FOREIGN = {
    ".pt": "give the network as package.module:factory, or save it with torch.export.save as .pt2",
    ".pth": "give the network as package.module:factory, or save it with torch.export.save as .pt2",
    ".safetensors": "it holds weights only: give the network as package.module:factory",
    ".tflite": "convert it to ONNX first (pip install tf2onnx)",
    ".h5": "convert it to ONNX first (pip install tf2onnx)",
    ".keras": "convert it to ONNX first (pip install tf2onnx)",
    ".pb": "convert it to ONNX first (pip install tf2onnx)",
}


def load(model: str | Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Source:
    """Load ``model``, check it, and fix every input to a static shape.

    ``model`` is a path to ``.onnx`` (opset 7 or newer; external data inside its folder), a path
    to a ``.pt2`` program, ``package.module:factory`` for a torch module, or a zoo name.
    ``shapes`` gives full input shapes by input name, in the model's own layout. A symbolic
    leading dimension that ``shapes`` leaves open becomes 1; any other is a UserError.
    Intermediate shapes that only constant folding can resolve stay open in ``Source.model``.

    Raises UserError (Unsupported for valid models edgepipe does not compile), always one line.
    """
    text = str(model)
    given = {name: tuple(shape) for name, shape in (shapes or {}).items()}
    if isinstance(model, str) and text in zoo.names():
        from edgepipe.importer.from_zoo import load_zoo

        return load_zoo(text, given)
    if isinstance(model, str) and _FACTORY.fullmatch(text) and not Path(text).exists():
        from edgepipe.importer.from_torch import load_factory

        return load_factory(text, given)
    path = _existing_file(Path(text), text)
    if path.suffix.lower() == ".pt2":
        from edgepipe.importer.from_torch import load_program

        return load_program(path, given)
    if path.suffix.lower() in _FOREIGN:
        raise UserError(
            f"{path.suffix} is not a format edgepipe reads",
            where=path.name,
            fix=_FOREIGN[path.suffix.lower()],
        )
    from edgepipe.importer.from_onnx import load_onnx

    return load_onnx(path, given)


def _existing_file(path: Path, text: str) -> Path:
    """Return ``path`` if it is a regular file; otherwise say what ``text`` could have meant."""
    if path.is_file():
        return path
    if path.is_dir() and text:  # Path("") is the current folder
        if (path / "manifest.json").is_file():
            raise UserError(
                "this folder is a bundle, already compiled", where=text, fix="give a model"
            )
        raise UserError("is a folder", where=text, fix="give the .onnx or .pt2 file in it")
    if path.exists() and text:
        raise UserError("is not a regular file", where=text, fix="give an .onnx or .pt2 file")
    if not path.suffix and len(path.parts) <= 1:
        raise UserError(
            f"unknown model '{text}'", where="MODEL", fix=did_you_mean(text, zoo.names())
        )
    siblings = []
    if path.parent.is_dir():
        siblings = [p.name for p in path.parent.iterdir() if p.suffix in (".onnx", ".pt2")]
    raise UserError(
        "no such file",
        where=text,
        fix=did_you_mean(path.name, siblings) if 0 < len(siblings) <= 20 else "check the path",
    )
