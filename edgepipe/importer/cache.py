"""The cache of exported zoo networks, in the user's cache folder.

A file is named ``NAME-KEY-SHA256.onnx``: KEY stands for everything the export depends on,
SHA256 is that of the content and is checked on every read. A damaged or foreign file is
ignored; a folder that cannot be written only costs the export again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from edgepipe.zoo import ZooEntry

# Raise when the export itself changes (opset, optimisation), not only its sources.
_EXPORT_VERSION = "1"


def folder() -> Path:
    """``$XDG_CACHE_HOME/edgepipe/zoo``, or ``~/.cache/edgepipe/zoo``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "edgepipe" / "zoo"


def key(entry: ZooEntry, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """16 hex digits that stand for builder, builder sources, shapes and export version."""
    digest = hashlib.sha256(f"{_EXPORT_VERSION} {entry.builder} {entry.inputs}".encode())
    digest.update(repr(sorted(shapes.items())).encode())
    sources = Path(__file__).resolve().parent.parent / "zoo"
    for source in sorted(sources.glob("*.py")):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def read(name: str, key: str) -> bytes | None:
    """The cached export, or None where there is none that is whole."""
    try:
        candidates = sorted(folder().glob(f"{name}-{key}-*.onnx"))
    except OSError:
        return None
    for path in candidates:
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == path.stem.rsplit("-", 1)[1]:
                return content
    return None


def write(name: str, key: str, content: bytes) -> None:
    """Keep ``content``; older exports of the same network are removed. Never raises OSError."""
    with contextlib.suppress(OSError):
        target = folder()
        target.mkdir(parents=True, exist_ok=True)
        final = target / f"{name}-{key}-{hashlib.sha256(content).hexdigest()}.onnx"
        handle, temporary = tempfile.mkstemp(dir=target, prefix=f".{name}-", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            Path(temporary).replace(final)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
