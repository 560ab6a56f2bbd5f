"""Max and average pooling over blocked layouts.

Maximum: coordinates are clamped to the input, which repeats elements of the window and so leaves
the maximum unchanged; the zero border must not take part. Average: the border adds zeros, and the
divisor counts what ONNX counts.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import (
    Registers,
    kernel,
    load,
    loop,
    maximum,
    minimum,
    parallel,
    splat,
    zero_border,
)
from edgepipe.kernels.ops import Op, PoolOp
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, PoolOp):
        return ""
    if op.kind == "max" and op.dilations != (1, 1) and op.offset != (0, 0):
        return "dilated and padded max pooling cannot clamp its coordinates"
    if op.kind == "average" and op.dilations != (1, 1):
        return "dilated average pooling"
    return None


def default(op: PoolOp, target: Target) -> Knobs:
    return {}


def _covered(start: Any, size: int, low: int, high: int) -> Any:
    """How many of ``start .. start + size - 1`` lie in ``low .. high - 1``."""
    return minimum(start + size, high) - maximum(start, low)


def divisor(op: PoolOp, y: Any, x: Any) -> Any:
    (kh, kw), (sy, sx) = op.kernel, op.strides
    top, left = op.offset
    if op.count_include_pad:
        low = (-top, -left)
        high = (op.x.h + op.pads_end[0], op.x.w + op.pads_end[1])
    else:
        low, high = (0, 0), (op.x.h, op.x.w)
    height = _covered(y * sy - top, kh, low[0], high[0])
    width = _covered(x * sx - left, kw, low[1], high[1])
    return tirx.Cast("float32", tirx.convert(height * width))


def emit(op: PoolOp, knobs: Knobs) -> Any:
    x, y, lanes = op.x, op.y, op.y.lanes
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.strides, op.dilations
    top, left = op.offset

    def body(*buffers: Any) -> None:
        source, *residuals, target = buffers

        def tap(place: Any, ky: int, kx: int) -> Any:
            n, block, row, column = place
            in_y, in_x = row * sy + ky * dy - top, column * sx + kx * dx - left
            if op.kind == "max":
                in_y = minimum(maximum(in_y, 0), x.h - 1)
                in_x = minimum(maximum(in_x, 0), x.w - 1)
            return load(source, x.offset(n, block, in_y, in_x), lanes)

        with (
            parallel(y.n) as n,
            parallel(y.blocks) as block,
            parallel(y.h) as row,
            loop(y.w) as column,
        ):
            acc = Registers(1, lanes)
            acc[0] = tap((n, block, row, column), 0, 0)
            for ky in range(kh):
                for kx in range(kw):
                    if (ky, kx) == (0, 0):
                        continue
                    value = tap((n, block, row, column), ky, kx)
                    acc[0] = tirx.max(acc[0], value) if op.kind == "max" else acc[0] + value
            result = acc[0]
            if op.kind == "average":
                result = result / splat(divisor(op, row, column), lanes)
            finish(op, residuals, target, (n, block, row, column), result)
        zero_border(y, target)

    return kernel(f"{op.kind}_pool", signature(op, [("x", x.elements, "float32")]), body)


TEMPLATE = KernelTemplate(
    name="pool", matches=matches, default=default, emit=emit, accumulator="float32"
)
