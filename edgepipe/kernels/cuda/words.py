"""8-bit codes on a GPU: four in a 32-bit word, and from int32 sums to codes, bit for bit as the
interpreter computes it.

A product that is added to something must not fuse with the sum, which would round once instead of
twice: ``__fmul_rn`` never does. ``__float2int_rn`` rounds half to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import Registers, float32, load, operand_offset, store
from edgepipe.kernels.cuda.threads import LANES, THREADS, WARP, fill_border, launch, when
from edgepipe.kernels.integer_ops import Limits, Residual
from edgepipe.kernels.layout import Blocked

#: The least compute capability with a dot product of four bytes, TX2's 6.2 apart (CUDA C++
#: programming guide, throughput of native arithmetic instructions).
LEAST_SM = 70


def const(value: int) -> Any:
    return tirx.const(value, "int32")


def dot4(a: Any, b: Any, total: Any) -> Any:
    """``total`` plus four products of signed bytes."""
    return tirx.call_pure_extern("int32", "__dp4a", a, b, total)


def width(*layouts: Blocked) -> int:
    """Channels that a thread takes: a word where every pixel has whole words."""
    return LANES if all(x.lanes % LANES == 0 for x in layouts) else 1


def at(layout: Blocked, place: Any, channel: Any) -> Any:
    """Offset of ``channel`` of pixel (n, row, column) in any layout."""
    n, row, column = place
    if layout.blocks == 1:
        return layout.offset(n, 0, row, column) + channel
    if layout.lanes == 1:
        return layout.offset(n, channel, row, column)
    block, lane = channel // layout.lanes, channel % layout.lanes
    return layout.offset(n, block, row, column) + lane


def operand(layout: Blocked, place: Any, channel: Any) -> Any:
    """Offset of ``channel`` of a pixel of an NHWC operand, which may be one for all pixels."""
    n, row, column = place
    return operand_offset(layout, n, 0, row, column) + held(layout, channel)


def held(layout: Blocked, channel: Any) -> Any:
    """``channel``, or the last that ``layout`` holds where it holds fewer than a result does."""
    return tirx.min(channel, layout.lanes - 1) if layout.lanes < LANES else channel


def word(buffer: Any, offset: Any) -> Any:
    """Four codes as they lie."""
    return tirx.reinterpret("int32", load(buffer, offset, LANES))


def joined(values: Sequence[Any]) -> Any:
    """The low bytes of four int32 as one word."""
    result = tirx.bitwise_and(values[0], const(255))
    for i, value in enumerate(values[1:], 1):
        low = tirx.bitwise_and(value, const(255))
        result = tirx.bitwise_or(result, tirx.shift_left(low, const(8 * i)))
    return result


def byte(value: Any, lane: int, signed: bool = True) -> Any:
    """One code of a word, as int32."""
    if signed:
        return tirx.shift_right(tirx.shift_left(value, const(24 - 8 * lane)), const(24))
    return tirx.bitwise_and(tirx.shift_right(value, const(8 * lane)), const(255))


def codes(buffer: Any, offset: Any, lanes: int) -> list[Any]:
    """``lanes`` (4 or 1) consecutive codes as int32."""
    signed, found = str(buffer.dtype) == "int8", Registers(1, 1, "int32")
    if lanes == 1:
        found[0] = tirx.Cast("int32", buffer[offset])
        return [found[0]]
    found[0] = word(buffer, offset)
    return [byte(found[0], lane, signed) for lane in range(lanes)]


def put_codes(buffer: Any, offset: Any, values: Sequence[Any]) -> None:
    """Store int32 values as consecutive codes: four or one."""
    dtype = str(buffer.dtype)
    if len(values) == 1:
        store(buffer, offset, tirx.Cast(dtype, values[0]), 1)
        return
    store(buffer, offset, tirx.reinterpret(f"{dtype}x{LANES}", joined(values)), LANES)


def scaled(value: Any, multiplier: Any) -> Any:
    """float32(value) · multiplier, rounded."""
    wide = tirx.Cast("float32", value)
    return tirx.call_pure_extern("float32", "__fmul_rn", wide, multiplier)


def addends(buffer: Any, residual: Residual, place: Any, channel: Any, lanes: int) -> list[Any]:
    """(code − zero) · multiplier of ``lanes`` channels of a residual."""
    found = codes(buffer, operand(residual.layout, place, channel), lanes)
    return [scaled(c - residual.layout.zero, float32(residual.multiplier)) for c in found]


def put(
    buffer: Any, y: Blocked, place: Any, channel: Any, sums: Sequence[Any], limits: Limits
) -> None:
    """Store float sums of consecutive channels from ``channel`` on, as ``y`` holds them."""
    inside = [_cut(value, limits) for value in sums]
    where = at(y, place, channel)
    if y.dtype == "float32":
        for lane, value in enumerate(inside):
            store(buffer, where + lane, value, 1)
        return
    rounded = [tirx.call_pure_extern("int32", "__float2int_rn", v) + y.zero for v in inside]
    put_codes(buffer, where, rounded)


def _cut(value: Any, limits: Limits) -> Any:
    if limits.low > -math.inf:
        value = tirx.max(value, float32(limits.low))
    return tirx.min(value, float32(limits.high)) if limits.high < math.inf else value


def each(
    y: Blocked, lanes: int, buffer: Any, compute: Callable[[Any, Any], None],
    channels: int = 0, border: bool = True,
) -> None:  # fmt: skip
    """``compute((n, row, column), channel)`` in a thread for every ``lanes`` channels of a pixel,
    ``channels`` of them instead of all; then the border."""
    parts = (channels or y.lanes * y.blocks) // lanes
    count = y.n * y.h * y.w * parts
    threads = min(THREADS, -(-count // WARP) * WARP)
    blocks = -(-count // threads)
    with launch((blocks,), threads) as (block, _, _, thread):
        index = block * threads + thread
        with when(True if count % threads == 0 else index < count):
            if y.blocks > 1 or (y.lanes == 1 and y.c > 1):  # neighbours lie along pixels
                part, pixel = index // (y.h * y.w) % parts, index % (y.h * y.w)
                n = index // (y.h * y.w * parts)
            else:
                part, pixel = index % parts, index // parts % (y.h * y.w)
                n = index // (y.h * y.w * parts)
            compute((n, pixel // y.w, pixel % y.w), part * lanes)
        if border:
            fill_border(y, buffer, index, blocks * threads)
