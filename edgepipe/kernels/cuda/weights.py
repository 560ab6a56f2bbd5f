"""Weights as CUDA kernels read them: rows in any of the stored formats, four values at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import load
from edgepipe.kernels.cuda.threads import read
from edgepipe.kernels.weights import WeightFormat

_STORED = {"float32": "float32", "float16": "float16", "int8": "int8"}


def unsupported(format: WeightFormat) -> str | None:
    """Why kernels cannot read ``format``, or None."""
    if format.kind not in _STORED or format.group:
        return f"weights {format} have no CUDA kernel"
    return None


def packed(format: WeightFormat, array: np.ndarray) -> np.ndarray:
    """``array`` in the format's element type, contiguous."""
    return np.ascontiguousarray(array, _STORED[format.kind])


def arguments(format: WeightFormat, elements: int, channels: int) -> list[tuple[str, int, str]]:
    """Kernel arguments: the weights, and one scale per channel where they are codes."""
    found = [("w", elements, _STORED[format.kind])]
    return found + ([("s", channels, "float32")] if format.coded else [])


def row_values(buffer: Any, offset: Any, lanes: int = 4) -> Any:
    """``lanes`` weights from ``offset`` on, as float32, without scale."""
    return read(buffer, offset, lanes)


def scaled(
    format: WeightFormat, buffers: Sequence[Any], channel: Any, value: Any, lanes: int = 4
) -> Any:
    """Complete sums of ``lanes`` channels from ``channel`` on, times their scales."""
    return value * load(buffers[1], channel, lanes) if format.coded else value
