"""ONNX operators as Relax kernels, one file per operator family.

Adding an operator is adding a function decorated with ``@converts("Op")`` to a family file, or
a new file. ``find`` imports every file of this folder once.
"""

from __future__ import annotations

import importlib
import pkgutil

from edgepipe.lowering.converters.registry import CONVERTERS, REFUSED, Converter, converts, refuses

__all__ = ["CONVERTERS", "REFUSED", "Converter", "converts", "find", "load_all", "refuses"]


def load_all() -> None:
    """Import every family file, which fills CONVERTERS and REFUSED."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def find(op_type: str) -> Converter | None:
    """The converter of a standard-domain operator, or None."""
    load_all()
    return CONVERTERS.get(op_type)
