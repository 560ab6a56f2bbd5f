"""TVM without torch: its bindings import torch first where that is installed, never needing it."""

from __future__ import annotations

import sys


def load() -> None:
    """Import TVM. It takes torch in only where that is loaded already: four seconds and 170 MB.

    They import it against a conflict of symbols on Windows, which has none of the tools here.
    """
    if "torch" in sys.modules:
        import tvm

        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # importing it says that it is missing
    try:
        import tvm  # noqa: F401
    finally:
        del sys.modules["torch"]
