"""Writing a file so that it exists whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from edgepipe import temporary


def write(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file beside it; what killed processes left
    of such files is removed. Raises OSError."""
    path = path.absolute()
    temporary.sweep(path)
    with temporary.file(path) as work:
        with work.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        work.chmod(0o644)
        work.replace(path)
