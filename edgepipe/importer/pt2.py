"""A look into ``.pt2`` archives before torch opens them."""

from __future__ import annotations

from pathlib import Path


def check(path: Path) -> None:
    """Refuse archives."""
