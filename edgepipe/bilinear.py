"""Bilinear resizing by tables: which two neighbours an output lies between, and how far."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

#: Values of ONNX's coordinate_transformation_mode that have tables.
TRANSFORMS = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")


def source_positions(mode: str, source: int, result: int) -> Array:
    """Fractional source coordinate of each output (ONNX Resize, coordinate transformations)."""
    at = np.arange(result, dtype=np.float64)
    if mode == "align_corners":
        return at * (source - 1) / max(result - 1, 1)
    if mode == "asymmetric":
        return at * source / result
    if mode == "pytorch_half_pixel" and result == 1:
        return at * 0
    return (at + 0.5) * source / result - 0.5


def tables(mode: str, source: int, result: int) -> tuple[Array, Array]:
    """Of ``result`` outputs along an axis of ``source`` elements: the two source indices of each,
    int32 [2·result], interleaved, and the weight of the second, float32 [result]."""
    at = np.clip(source_positions(mode, source, result), 0, source - 1)
    low = np.minimum(np.floor(at).astype(np.int32), max(source - 2, 0))
    high = np.minimum(low + 1, source - 1)
    indices = np.stack([low, high], 1).astype(np.int32).reshape(-1)
    return indices, (at - low).astype(np.float32)


def both_tables(mode: str, source: tuple[int, int], result: tuple[int, int]) -> list[Array]:
    """Indices and weights along the height, then along the width."""
    return [table for s, r in zip(source, result, strict=True) for table in tables(mode, s, r)]


def interpolate(x: Array, mode: str, result: tuple[int, int]) -> Array:
    """``x`` [n, c, h, w] float32 resized to ``result`` (height, width): first along the width,
    then the height, each as a + (b − a)·weight with every operation rounded to float32."""
    rows, below, columns, right = both_tables(mode, x.shape[2:], result)
    left, other = x[..., columns[::2]], x[..., columns[1::2]]
    wide = left + (other - left) * right
    upper, lower = wide[:, :, rows[::2]], wide[:, :, rows[1::2]]
    found: Array = upper + (lower - upper) * below[:, None]
    return found
