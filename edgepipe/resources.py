"""Where the data folders are: in the wheel (``edgepipe/_data``) or in the checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_file(name: str) -> Path:
    """Return the file ``LICENSE`` that belongs to this install."""
    shipped = _PACKAGE / "_data" / name
    return shipped if shipped.is_file() else _PACKAGE.parent / name


def data_folder(name: str) -> Path:
    """Return the folder ``targets``, ``calibration`` or ``models`` that belongs to this install."""
    shipped = _PACKAGE / "_data" / name
    return shipped if shipped.is_dir() else _PACKAGE.parent / name
