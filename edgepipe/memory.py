"""Memory that is free goes back to the system: large models leave holes as large as they are."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable


def trimmed(progress: Callable[[str], None]) -> Callable[[str], None]:
    """``progress`` that gives back, at the start of each stage, what the one before it freed."""

    def start(line: str) -> None:
        give_back()
        progress(line)

    return start


def give_back() -> None:
    """Return the free pages of the C library's heap to the system, where it can (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
