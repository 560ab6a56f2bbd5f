"""Bilinear resizing over blocked layouts, from tables of source rows, columns and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.bilinear import both_tables
from edgepipe.kernels.builder import kernel, load, loop, parallel, splat, zero_border
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import BilinearOp, Op
from edgepipe.kernels.output import Argument, finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, BilinearOp) else ""


def default(op: BilinearOp, target: Target) -> Knobs:
    return {}


def pack(op: BilinearOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return both_tables(op.mode, (op.x.h, op.x.w), (op.y.h, op.y.w))


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

    inputs = [("x", x.elements, "float32"), *table_arguments(y)]
    return kernel("bilinear", signature(op, inputs), body)


def table_arguments(y: Blocked) -> list[Argument]:
    """The parameters that ``both_tables`` fills."""
    return [
        ("iy", 2 * y.h, "int32"),
        ("wy", y.h, "float32"),
        ("ix", 2 * y.w, "int32"),
        ("wx", y.w, "float32"),
    ]


TEMPLATE = KernelTemplate(name="resize", matches=matches, default=default, emit=emit, pack=pack)
