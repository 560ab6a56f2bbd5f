"""Writing a folder so that it exists whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgepipe import temporary
from edgepipe.blob import Blob
from edgepipe.errors import UserError

MANIFEST = "manifest.json"
FORMAT = "edgepipe-bundle"
_PROGRAMS = frozenset({"bench"})
#: How often others may be in between.
_RACES = 5
#: AT_FDCWD and RENAME_EXCHANGE of renameat2(2).
_HERE, _EXCHANGE = -100, 2


def safe_name(text: str) -> str:
    """``text`` with everything but letters, digits, dot, dash, plus, underscore replaced."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text)


def read_json(path: Path) -> Any:
    """Parse a JSON file; None where there is none. Raises UserError where it cannot be read."""
    if path.exists() and not path.is_file():  # a link to a device never ends
        raise UserError("not a regular file", where=str(path))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"not readable as JSON: {error}", where=str(path)) from None
    except RecursionError:
        raise UserError("not readable as JSON: nested too deep", where=str(path)) from None


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


def install(
    destination: Path,
    files: dict[str, bytes | Blob],
    check: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write ``files`` as the folder ``destination``, replacing a bundle that is there. Each is
    taken out of ``files`` once it is written, so that large ones are not in memory any longer.

    The files go to a temporary folder beside it, are flushed to the disk, ``check`` looks at them
    there, and the folder is renamed: whatever happens, and be it SIGKILL or a power failure, the
    destination is the old bundle or the new one. Nothing is left behind on a failure; what killed
    processes left is removed by the next one. Raises UserError, and what ``check`` raises.
    """
    destination = destination.absolute()
    created = [p for p in destination.parents if not p.exists()]
    work: Path | None = None
    done = False
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary.sweep(destination)
        with temporary.folder(destination) as work:
            _fill(work, files)
            check(work)
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
            for folder in created:
                _remove_empty(folder)


def _fill(work: Path, files: dict[str, bytes | Blob]) -> None:
    for name in sorted(files):
        path = work / name
        with path.open("wb") as stream:
            stream.writelines(Blob.of(files.pop(name)).pieces)
            stream.flush()
            os.fsync(stream.fileno())
        path.chmod(0o755 if name in _PROGRAMS else 0o644)
    work.chmod(0o755)  # mkdtemp makes it private
    _sync(work)


def _swap(work: Path, destination: Path) -> None:
    """Make ``work`` the destination; an old bundle there takes its place."""
    for _ in range(_RACES):
        # Checked again: the compilation took a while, and others may have been here.
        check_replaceable(destination)
        try:
            if destination.exists():
                _exchange(work, destination)
            else:
                work.rename(destination)
            return
        except OSError as error:
            # Another process put its bundle there, or took its own away, in between.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
    raise UserError("others write there at the same time", where=str(destination),
                    fix="choose another output folder with -o")  # fmt: skip


def _exchange(work: Path, destination: Path) -> None:
    """Exchange two folders: in one step where the system can."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "renameat2"):
        paths = os.fsencode(work), os.fsencode(destination)
        if libc.renameat2(_HERE, paths[0], _HERE, paths[1], _EXCHANGE) == 0:
            return
        if (code := ctypes.get_errno()) not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code))
    # Two steps. The old bundle may be the user's only copy: it comes back if the second one fails,
    # and a name that no sweep looks for keeps it if the process dies in between.
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
    try:
        destination.rename(old)
        try:
            work.rename(destination)
        except BaseException:
            old.rename(destination)
            raise
    except BaseException:
        _remove_empty(old)
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
