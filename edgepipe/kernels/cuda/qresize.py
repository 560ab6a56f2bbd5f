"""Bilinear resizing of codes, a thread for four channels of a pixel, as the CPU's template."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import Registers, float32, kernel
from edgepipe.kernels.cuda.words import codes, each, held, put, scaled, width
from edgepipe.kernels.integer_ops import QResizeOp
from edgepipe.kernels.qresize import matches
from edgepipe.kernels.resize import table_arguments
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def default(op: QResizeOp, target: Target) -> Knobs:
    return {"lanes": width(op.x, op.y)}


def emit(op: QResizeOp, knobs: Knobs) -> Any:
    lanes = knobs["lanes"]

    def body(*buffers: Any) -> None:
        source, row_index, row_weight, column_index, column_weight, target = buffers

        def compute(place: Any, channel: Any) -> None:
            n, row, column = place
            corners, sums = Registers(4 * lanes, 1), []
            for i in range(4):
                at_y, at_x = row_index[row * 2 + i // 2], column_index[column * 2 + i % 2]
                where = op.x.offset(n, 0, at_y, at_x) + held(op.x, channel)
                for lane, code in enumerate(codes(source, where, lanes)):
                    corners[4 * lane + i] = tirx.Cast("float32", code - op.x.zero)
            for lane in range(lanes):
                a, b, c, d = (corners[4 * lane + i] for i in range(4))
                upper, lower = (_mix(*side, column_weight[column]) for side in ((a, b), (c, d)))
                between = _mix(upper, lower, row_weight[row])
                sums.append(scaled(between, float32(op.multiplier)))
            put(target, op.y, place, channel, sums, op.limits)

        each(op.y, lanes, target, compute)

    arguments = [
        ("x", op.x.elements, op.x.dtype),
        *table_arguments(op.y),
        ("y", op.y.elements, op.y.dtype),
    ]
    return kernel("q_bilinear", arguments, body)


def _mix(a: Any, b: Any, weight: Any) -> Any:
    return a + scaled(b - a, weight)


TEMPLATE = KernelTemplate(
    name="q_resize", matches=matches, default=default, emit=emit, accumulator="float32"
)
