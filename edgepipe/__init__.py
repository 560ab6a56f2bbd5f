"""edgepipe: a trained network goes in, a bundle that runs on the device comes out.

The names below are imported when they are first used: ``import edgepipe`` loads neither NumPy
nor any compiler, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle
    from edgepipe.errors import EdgepipeError, Unsupported, UserError, ValidationFailed
    from edgepipe.pipeline import compile
    from edgepipe.recipe import Recipe
    from edgepipe.target import Target
    from edgepipe.validation import Report

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "EdgepipeError",
    "Recipe",
    "Report",
    "Target",
    "Unsupported",
    "UserError",
    "ValidationFailed",
    "compile",
]

_HOME = {
    "Bundle": "bundle",
    "EdgepipeError": "errors",
    "Recipe": "recipe",
    "Report": "validation",
    "Target": "target",
    "Unsupported": "errors",
    "UserError": "errors",
    "ValidationFailed": "errors",
    "compile": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgepipe' has no attribute '{name}'")
    return getattr(import_module(f"edgepipe.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
