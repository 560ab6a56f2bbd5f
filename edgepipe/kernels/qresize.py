"""Bilinear resizing of codes over NHWC: float32 between four codes, rounded once.

Each step is rounded to float32 as ``edgepipe.bilinear.interpolate`` does; no product fuses with
the sum behind it.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import float32, kernel, load, splat, zero_border
from edgepipe.kernels.dot import intrinsic
from edgepipe.kernels.integer_ops import QResizeOp
from edgepipe.kernels.qelementwise import over_channels, vector
from edgepipe.kernels.requantize import put, scaled
from edgepipe.kernels.resize import table_arguments
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QResizeOp):
        return ""
    return "its input is not in NHWC" if op.x.blocks > 1 else None


def default(op: QResizeOp, target: Target) -> Knobs:
    return {"lanes": vector([op.x, op.y]), "arch": target.arch}


def emit(op: QResizeOp, knobs: Knobs) -> Any:
    lanes, arch = knobs["lanes"], knobs["arch"]
    wide = [f"{kind}x{lanes}" if lanes > 1 else kind for kind in ("int32", "float32")]

    def mix(a: Any, b: Any, weight: Any) -> Any:
        product = (b - a) * splat(weight, lanes)
        return a + intrinsic(wide[1], "arithmetic.fence", product)

    def body(*buffers: Any) -> None:
        source, row_index, row_weight, column_index, column_weight, target = buffers

        def visit(place: Any, channel: Any) -> None:
            n, row, column = place

            def value(below: int, right: int) -> Any:
                at_y, at_x = row_index[row * 2 + below], column_index[column * 2 + right]
                codes = load(source, op.x.offset(n, 0, at_y, at_x) + channel, lanes)
                zero = splat(tirx.const(op.x.zero, "int32"), lanes)
                return tirx.Cast(wide[1], tirx.Cast(wide[0], codes) - zero)

            upper = mix(value(0, 0), value(0, 1), column_weight[column])
            lower = mix(value(1, 0), value(1, 1), column_weight[column])
            between = mix(upper, lower, row_weight[row])
            result = scaled(between, splat(float32(op.multiplier), lanes), lanes, fence=False)
            put(target, op.y, place, channel, [result], op.limits, arch, lanes)

        over_channels(op.y, lanes, visit)
        zero_border(op.y, target)

    arguments = [
        ("x", op.x.elements, op.x.dtype),
        *table_arguments(op.y),
        ("y", op.y.elements, op.y.dtype),
    ]
    return kernel("q_bilinear", arguments, body)


TEMPLATE = KernelTemplate(
    name="q_resize", matches=matches, default=default, emit=emit, accumulator="float32"
)
