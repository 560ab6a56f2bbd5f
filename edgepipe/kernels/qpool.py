"""Maximum and average of codes over windows, global pooling included, over NHWC.

Maximum: coordinates are clamped to the input, as in float. Average: the border holds the zero
point, so the window's int32 sum less its size times the zero point is the sum of the values.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import (
    Registers,
    float32,
    kernel,
    load,
    loop,
    maximum,
    minimum,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.integer_ops import QPoolOp
from edgepipe.kernels.qelementwise import over_channels, vector
from edgepipe.kernels.requantize import put, scaled
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QPoolOp):
        return ""
    return "its input is not in NHWC" if op.x.blocks > 1 else None


def default(op: QPoolOp, target: Target) -> Knobs:
    return {"lanes": vector([op.x, op.y]), "arch": target.arch}


def emit(op: QPoolOp, knobs: Knobs) -> Any:
    lanes, arch = knobs["lanes"], knobs["arch"]
    (kh, kw), (sy, sx), (top, left) = op.kernel, op.strides, op.offset

    def body(source: Any, target: Any) -> None:
        def tap(place: Any, channel: Any, ky: Any, kx: Any) -> Any:
            n, row, column = place
            in_y, in_x = row * sy + ky - top, column * sx + kx - left
            if op.kind == "max":
                in_y = minimum(maximum(in_y, 0), op.x.h - 1)
                in_x = minimum(maximum(in_x, 0), op.x.w - 1)
            return load(source, op.x.offset(n, 0, in_y, in_x) + channel, lanes)

        def largest(place: Any, channel: Any) -> None:
            acc = Registers(1, lanes, op.x.dtype)
            acc[0] = tap(place, channel, 0, 0)
            with loop(kh) as ky, loop(kw) as kx:
                acc[0] = tirx.max(acc[0], tap(place, channel, ky, kx))
            n, row, column = place
            store(target, op.y.offset(n, 0, row, column) + channel, acc[0], lanes)

        def mean(place: Any, channel: Any) -> None:
            wide = f"int32x{lanes}"
            acc = Registers(1, lanes, "int32")
            acc[0] = splat(tirx.const(-kh * kw * op.x.zero, "int32"), lanes)
            with loop(kh) as ky, loop(kw) as kx:
                acc[0] = acc[0] + tirx.Cast(wide, tap(place, channel, ky, kx))
            value = scaled(acc[0], splat(float32(op.multiplier), lanes), lanes, fence=False)
            put(target, op.y, place, channel, [value], op.limits, arch, lanes)

        over_channels(op.y, lanes, largest if op.kind == "max" else mean)
        zero_border(op.y, target)

    arguments = [("x", op.x.elements, op.x.dtype), ("y", op.y.elements, op.y.dtype)]
    return kernel(f"q_{op.kind}_pool", arguments, body)


TEMPLATE = KernelTemplate(
    name="q_pool",
    matches=matches,
    default=default,
    emit=emit,
    arithmetic="int8",
    accumulator="int32",
)
