"""The cache of exported zoo networks, in the user's cache folder.

A file is named ``NAME-SHAPES-SOURCES-SHA256.onnx``: SHAPES stands for the input shapes, SOURCES
for everything else the export depends on, SHA256 is that of the content and is checked on every
read. A damaged or foreign file is ignored; a folder that cannot be written only costs the
export again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgepipe import zoo
from edgepipe.zoo import ZooEntry

# Raise when the export itself changes (opset, optimisation), not only its sources.
_EXPORT_VERSION = "3"


def folder() -> Path:
    """``$XDG_CACHE_HOME/edgepipe/zoo``, or ``~/.cache/edgepipe/zoo``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "edgepipe" / "zoo"


def key(entry: ZooEntry, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """``SHAPES-SOURCES`` of the file name, 8 and 16 hex digits."""
    shape_key = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:8]
    facts = (_EXPORT_VERSION, entry.builder, entry.inputs, entry.outputs)
    digest = hashlib.sha256(repr(facts).encode())
    for source in sorted(Path(zoo.__file__).parent.glob("*.py")):
        if not source.name.startswith("train_"):
            digest.update(source.name.encode() + source.read_bytes())
    return f"{shape_key}-{digest.hexdigest()[:16]}"


def read(name: str, key: str) -> bytes | None:
    """The cached export, or None where there is none that is whole."""
    with contextlib.suppress(OSError):
        for path in sorted(folder().glob(f"{name}-{key}-*.onnx")):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.stem.rsplit("-", 1)[1]:
                return content
    return None


def write(name: str, key: str, content: bytes) -> None:
    """Keep ``content`` in place of older exports at the same shapes. Never raises OSError."""
    with contextlib.suppress(OSError):
        target = folder()
        target.mkdir(parents=True, exist_ok=True)
        final = target / f"{name}-{key}-{hashlib.sha256(content).hexdigest()}.onnx"
        handle, temporary = tempfile.mkstemp(dir=target, prefix=f".{name}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(final)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        for old in target.glob(f"{name}-{key.partition('-')[0]}-*.onnx"):
            if old != final:
                old.unlink(missing_ok=True)
