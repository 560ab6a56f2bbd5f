"""Writing a folder so that it exists whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgepipe.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "edgepipe-bundle"
_PROGRAMS = frozenset({"bench"})


def safe_name(text: str) -> str:
    """``text`` with everything but letters, digits, dot, dash, plus, underscore replaced."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)


def read_json(path: Path) -> Any:
    """Parse a JSON file; None where there is none. Raises UserError where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"not readable as JSON: {error}", where=str(path)) from None


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a folder (not a link to one) with a bundle's manifest."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        manifest = read_json(path / MANIFEST)
    except UserError:
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def check_replaceable(path: Path) -> None:
    """Refuse a path that exists and is not a bundle, or one with files that are not the
    bundle's: they would be lost. Raises UserError."""
    if not path.exists() and not path.is_symlink():
        return
    if not is_bundle(path):
        raise UserError(
            "exists and is not a bundle, so it is not replaced",
            where=str(path),
            fix="choose another output folder with -o, or remove it",
        )
    listed = read_json(path / MANIFEST).get("files")
    own = {MANIFEST, *(listed if isinstance(listed, dict) else ())}
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in own)
    if foreign:
        raise UserError(
            f"holds files that are not the bundle's ({', '.join(foreign[:3])}), "
            "so it is not replaced",
            where=str(path),
            fix="move them away, or choose another output folder with -o",
        )


def check_writable(path: Path) -> None:
    """Refuse a path whose nearest existing parent is no folder to write in. Raises UserError."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError("is not a folder", where=str(parent), fix="choose another -o")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError("cannot write here", where=str(parent), fix="choose another -o")


def install(destination: Path, files: Mapping[str, bytes]) -> None:
    """Write ``files`` as the folder ``destination``, replacing a bundle that is there.

    The files go to a temporary folder beside it, are flushed to the disk, and the folder is
    renamed. Nothing is left behind on any failure, Ctrl-C included. Raises UserError.
    """
    destination = destination.absolute()
    created = [p for p in destination.parents if not p.exists()]
    work: Path | None = None
    done = False
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
        _fill(work, files)
        _swap(work, destination)
        done = True
        _sync(destination.parent)
    except OSError as error:
        raise UserError(
            f"cannot write the bundle: {error.strerror or error}",
            where=str(destination),
            fix="choose a folder on a disk with space that you can write to",
        ) from None
    finally:
        if not done:
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
            for folder in created:
                _remove_empty(folder)


def _fill(work: Path, files: Mapping[str, bytes]) -> None:
    for name, data in sorted(files.items()):
        path = work / name
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        path.chmod(0o755 if name in _PROGRAMS else 0o644)
    work.chmod(0o755)  # mkdtemp makes it private
    _sync(work)


def _swap(work: Path, destination: Path) -> None:
    # Checked again: the compilation took a while, and others may have been here.
    check_replaceable(destination)
    if not destination.exists():
        work.rename(destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}-old-", dir=destination.parent))
    try:
        destination.rename(old)
        try:
            work.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
    except BaseException:
        _remove_empty(old)  # never with what is in it: it may be the user's only copy
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
