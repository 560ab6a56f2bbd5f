"""Temporary files and folders beside what they become, which their process holds a lock on: what
killed processes left is known by having none."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def folder(destination: Path) -> AbstractContextManager[Path]:
    """A new folder beside ``destination``. It is removed at the end, if it is still there."""
    return _held(lambda prefix, parent: tempfile.mkdtemp(prefix=prefix, dir=parent), destination)


def file(destination: Path) -> AbstractContextManager[Path]:
    """A new, empty file, as ``folder``."""

    def make(prefix: str, parent: Path) -> str:
        descriptor, name = tempfile.mkstemp(prefix=prefix, dir=parent)
        os.close(descriptor)
        return name

    return _held(make, destination)


def sweep(destination: Path) -> None:
    """Remove what killed processes left beside ``destination``: what nobody holds the lock of."""
    for left in destination.parent.glob(f"{glob.escape(_prefix(destination))}*"):
        with contextlib.suppress(OSError):
            lock = _lock(left)
            if lock is not None:
                _remove(left)
                os.close(lock)


@contextmanager
def _held(make: Callable[[str, Path], str], destination: Path) -> Iterator[Path]:
    while True:
        work = Path(make(_prefix(destination), destination.parent))
        # Before it has its lock another process may sweep it away.
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock = _lock(work)
            if lock is None or os.fstat(lock).st_nlink:
                break
            os.close(lock)
    try:
        yield work
    finally:
        _remove(work)
        if lock is not None:
            os.close(lock)


def _prefix(destination: Path) -> str:
    return f".{destination.name}.edgepipe-"


def _lock(path: Path) -> int | None:
    """A descriptor that holds a lock on ``path`` while this process lives; None where there are no
    locks. Raises BlockingIOError where another process has it, FileNotFoundError."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # whatever else has the name
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
