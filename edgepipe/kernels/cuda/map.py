"""Kernels of one thread per output vector: element-wise steps, upsampling, pooling, resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.bilinear import both_tables
from edgepipe.kernels.builder import Registers, kernel, loop, operand_offset, splat
from edgepipe.kernels.cuda.threads import each_vector, finish, read
from edgepipe.kernels.ops import BilinearOp, MapOp, Op, PoolOp, UpsampleOp
from edgepipe.kernels.output import signature
from edgepipe.kernels.pool import divisor
from edgepipe.kernels.pool import matches as pool_matches
from edgepipe.kernels.resize import table_arguments
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

_Op = MapOp | UpsampleOp | PoolOp | BilinearOp


def matches(op: Op, target: Target) -> str | None:
    if isinstance(op, PoolOp):
        return pool_matches(op, target)
    return None if isinstance(op, _Op) else ""


def default(op: _Op, target: Target) -> Knobs:
    return {}


def pack(op: _Op, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    if not isinstance(op, BilinearOp):
        return list(arrays)
    return both_tables(op.mode, (op.x.h, op.x.w), (op.y.h, op.y.w))


def emit(op: _Op, knobs: Knobs) -> Any:
    inputs = [("x", op.x.elements, op.x.dtype)]
    if isinstance(op, BilinearOp):
        inputs += table_arguments(op.y)

    def body(*buffers: Any) -> None:
        source, *rest, target = buffers
        tables, residuals = rest[: len(inputs) - 1], rest[len(inputs) - 1 :]

        def compute(*place: Any) -> None:
            if isinstance(op, PoolOp):
                value = _pooled(op, source, place)
            elif isinstance(op, BilinearOp):
                value = _interpolated(op, source, tables, place)
            else:
                value = _taken(op, source, place)
            finish(op, residuals, target, place, value)

        each_vector(op.y, target, compute)

    names = {MapOp: "map", UpsampleOp: "upsample", BilinearOp: "bilinear"}
    name = f"{op.kind}_pool" if isinstance(op, PoolOp) else names[type(op)]
    return kernel(name, signature(op, inputs), body)


def _taken(op: MapOp | UpsampleOp, source: Any, place: tuple[Any, ...]) -> Any:
    fy, fx = op.factors if isinstance(op, UpsampleOp) else (1, 1)
    n, block, row, column = place
    return read(source, operand_offset(op.x, n, block, row // fy, column // fx), op.y.lanes)


def _pooled(op: PoolOp, source: Any, place: tuple[Any, ...]) -> Any:
    x, lanes, (n, block, row, column) = op.x, op.y.lanes, place
    (kh, kw), (dy, dx) = op.kernel, op.dilations
    top, left = row * op.strides[0] - op.offset[0], column * op.strides[1] - op.offset[1]

    def tap(ky: Any, kx: Any) -> Any:
        at_y, at_x = top + ky * dy, left + kx * dx
        if op.kind == "max" and op.dilations == (1, 1):
            # Clamping repeats elements of the window: the border must not take part.
            at_y = tirx.min(tirx.max(at_y, 0), x.h - 1)
            at_x = tirx.min(tirx.max(at_x, 0), x.w - 1)
        return read(source, x.offset(n, block, at_y, at_x), lanes)

    result = Registers(1, lanes)
    result[0] = tap(0, 0) if op.kind == "max" else splat(tirx.const(0.0, "float32"), lanes)
    with loop(kh) as ky, loop(kw) as kx:
        value = tap(ky, kx)
        result[0] = tirx.max(result[0], value) if op.kind == "max" else result[0] + value
    if op.kind == "max":
        return result[0]
    return result[0] / splat(divisor(op, row, column), lanes)


def _interpolated(
    op: BilinearOp, source: Any, tables: Sequence[Any], place: tuple[Any, ...]
) -> Any:
    row_index, row_weight, column_index, column_weight = tables
    lanes, (n, block, row, column) = op.y.lanes, place
    corners = Registers(4, lanes)
    for i in range(4):
        at_y, at_x = row_index[row * 2 + i // 2], column_index[column * 2 + i % 2]
        corners[i] = read(source, op.x.offset(n, block, at_y, at_x), lanes)
    for i in range(2):
        weight = splat(column_weight[column], lanes)
        corners[2 * i] = corners[2 * i] + (corners[2 * i + 1] - corners[2 * i]) * weight
    return corners[0] + (corners[2] - corners[0]) * splat(row_weight[row], lanes)


TEMPLATE = KernelTemplate(
    name="map", matches=matches, default=default, emit=emit, pack=pack, accumulator="none"
)
