"""Bilinear resizing over blocked layouts, from tables of source rows, columns and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import kernel, load, loop, parallel, splat, zero_border
from edgepipe.kernels.ops import BilinearOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, BilinearOp) else ""


def default(op: BilinearOp, target: Target) -> Knobs:
    return {}


def source_positions(mode: str, source: int, result: int) -> np.ndarray:
    """Fractional source coordinate of each output (ONNX Resize, coordinate transformations)."""
    at = np.arange(result, dtype=np.float64)
    if mode == "align_corners":
        return at * (source - 1) / max(result - 1, 1)
    if mode == "asymmetric":
        return at * source / result
    if mode == "pytorch_half_pixel" and result == 1:
        return at * 0
    return (at + 0.5) * source / result - 0.5


def tables(mode: str, source: int, result: int) -> tuple[np.ndarray, np.ndarray]:
    """Per output the two source indices, interleaved, and the weight of the second."""
    at = np.clip(source_positions(mode, source, result), 0, source - 1)
    low = np.minimum(np.floor(at).astype(np.int32), max(source - 2, 0))
    high = np.minimum(low + 1, source - 1)
    indices = np.stack([low, high], 1).astype(np.int32).reshape(-1)
    return indices, (at - low).astype(np.float32)


def pack(op: BilinearOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [*tables(op.mode, op.x.h, op.y.h), *tables(op.mode, op.x.w, op.y.w)]


def emit(op: BilinearOp, knobs: Knobs) -> Any:
    x, y, lanes = op.x, op.y, op.y.lanes

    def body(*buffers: Any) -> None:
        source, row_index, row_weight, column_index, column_weight, *residuals, target = buffers

        def mix(a: Any, b: Any, weight: Any) -> Any:
            return a + (b - a) * splat(weight, lanes)

        with (
            parallel(y.n) as n,
            parallel(y.blocks) as block,
            parallel(y.h) as row,
            loop(y.w) as column,
        ):

            def pixel(row_side: int, column_side: int) -> Any:
                at_y = row_index[row * 2 + row_side]
                at_x = column_index[column * 2 + column_side]
                return load(source, x.offset(n, block, at_y, at_x), lanes)

            upper = mix(pixel(0, 0), pixel(0, 1), column_weight[column])
            lower = mix(pixel(1, 0), pixel(1, 1), column_weight[column])
            finish(
                op, residuals, target, (n, block, row, column), mix(upper, lower, row_weight[row])
            )
        zero_border(y, target)

    inputs = [
        ("x", x.elements, "float32"),
        ("iy", 2 * y.h, "int32"),
        ("wy", y.h, "float32"),
        ("ix", 2 * y.w, "int32"),
        ("wx", y.w, "float32"),
    ]
    return kernel("bilinear", signature(op, inputs), body)


TEMPLATE = KernelTemplate(name="resize", matches=matches, default=default, emit=emit, pack=pack)
