"""Which function converts which operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgepipe.lowering.converters.op import Op

#: Takes the node, returns one Relax expression per output, or a single one.
Converter = Callable[[Op], Any]

CONVERTERS: dict[str, Converter] = {}
#: Operators edgepipe refuses on purpose, with the reason a user reads.
REFUSED: dict[str, str] = {}


def converts(*op_types: str) -> Callable[[Converter], Converter]:
    """Register a function as the converter of ``op_types``."""

    def register(function: Converter) -> Converter:
        for op_type in op_types:
            assert op_type not in CONVERTERS, op_type
            CONVERTERS[op_type] = function
        return function

    return register


def refuses(reason: str, *op_types: str) -> None:
    """Record why ``op_types`` are not compiled."""
    for op_type in op_types:
        REFUSED[op_type] = reason
