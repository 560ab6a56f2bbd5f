"""Codes into and out of integer regions: quantisation, dequantisation, copies between layouts.

Copies between layouts are what a good layout choice avoids; the manifest counts those that remain.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import (
    float32,
    kernel,
    load,
    loop,
    minimum,
    parallel,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.dot import reinterpret
from edgepipe.kernels.integer_ops import DequantizeOp, Limits, MoveOp, QuantizeOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.qelementwise import over_channels, vector, width
from edgepipe.kernels.requantize import cut, put, rounded
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

_RANGE = {"int8": (-128, 127), "uint8": (0, 255)}


def matches(op: Any, target: Target) -> str | None:
    return None if isinstance(op, QuantizeOp | DequantizeOp | MoveOp) else ""


def default(op: Any, target: Target) -> Knobs:
    if isinstance(op, MoveOp):
        vectors = op.y.blocks == 1 and all(x.blocks == 1 for x in op.inputs)
        edges = [x.c for x in op.inputs[:-1]] + [op.inputs[-1].lanes, op.y.lanes]
        if op.spread > 1:
            vectors = vectors and not op.interleave
            edges = [op.y.c]
        return {"lanes": min(map(width, edges)) if vectors else 1}
    codes, plain = (op.y, op.x) if isinstance(op, QuantizeOp) else (op.x, op.y)
    lanes = vector([codes, plain]) if codes.blocks == 1 else 1
    pixels = 0
    image = plain.lanes == 1 and (codes.lanes == 4 or codes.lanes == codes.c == 1)
    if isinstance(op, QuantizeOp) and image:
        pixels = next(v for v in (8, 4, 2, 1) if v <= min(codes.w, target.simd.lanes_f32))
    return {"lanes": lanes, "pixels": pixels, "arch": target.arch}


def emit(op: Any, knobs: Knobs) -> Any:
    if isinstance(op, MoveOp):
        return _move(op, knobs)
    name = "quantize" if isinstance(op, QuantizeOp) else "dequantize"
    arguments = [("x", op.x.elements, op.x.dtype), ("y", op.y.elements, op.y.dtype)]

    def body(source: Any, target: Any) -> None:
        if isinstance(op, QuantizeOp):
            if knobs["pixels"]:
                _quantize_pixels(op, knobs, source, target)
            else:
                _quantize(op, knobs, source, target)
        else:
            _dequantize(op, knobs, source, target)
        zero_border(op.y, target)

    return kernel(name, arguments, body)


def _at(layout: Blocked, place: Any, channel: Any) -> Any:
    """Offset of ``channel`` of a pixel in any layout."""
    n, row, column = place
    if layout.blocks == 1:
        return layout.offset(n, 0, row, column) + channel
    if layout.lanes == 1:
        return layout.offset(n, channel, row, column)
    block = channel // layout.lanes
    return layout.offset(n, block, row, column) + channel % layout.lanes


def _quantize(op: QuantizeOp, knobs: Knobs, source: Any, target: Any) -> None:
    lanes = knobs["lanes"]
    low, high = (end - op.y.zero for end in _RANGE[op.y.dtype])
    scale = splat(float32(op.scale), lanes)

    def visit(place: Any, channel: Any) -> None:
        value = load(source, _at(op.x, place, channel), lanes) / scale
        if op.y.blocks == 1:
            put(target, op.y, place, channel, [value], Limits(low, high), knobs["arch"], lanes)
            return
        codes = rounded(cut(value, low, high, lanes), op.y.zero, lanes, knobs["arch"])
        store(target, _at(op.y, place, channel), tirx.Cast(op.y.dtype, codes), lanes)

    # The channels that both hold: either may be filled up further than the other.
    channels = min(op.x.lanes * op.x.blocks, op.y.lanes * op.y.blocks) if lanes > 1 else op.y.c
    _over(Blocked(op.y.n, channels, op.y.h, op.y.w, channels), lanes, visit)


def _over(layout: Blocked, lanes: int, visit: Any) -> None:
    """Every vector of channels of a tensor; the real channels only, one by one, for one lane."""
    if lanes > 1:
        over_channels(layout, lanes, visit)
        return
    with (
        parallel(layout.n) as n,
        parallel(layout.c) as channel,
        parallel(layout.h) as row,
        loop(layout.w) as column,
    ):
        visit((n, row, column), channel)


def _quantize_pixels(op: QuantizeOp, knobs: Knobs, source: Any, target: Any) -> None:
    """Images: from planes to pixels of one or four bytes, several pixels at a time."""
    x, y, pixels = op.x, op.y, knobs["pixels"]
    low, high = (end - y.zero for end in _RANGE[y.dtype])

    def codes(place: Any, channel: int) -> Any:
        n, row, column = place
        value = load(source, x.offset(n, channel, row, column), pixels)
        value = value / splat(float32(op.scale), pixels)
        return rounded(cut(value, low, high, pixels), y.zero, pixels, knobs["arch"])

    def word(place: Any) -> Any:
        result: Any = None
        for channel in range(x.c):
            byte = tirx.bitwise_and(codes(place, channel), splat(tirx.const(255, "int32"), pixels))
            if channel:
                byte = tirx.shift_left(byte, splat(tirx.const(8 * channel, "int32"), pixels))
            result = byte if result is None else tirx.bitwise_or(result, byte)
        return reinterpret(f"{y.dtype}x{4 * pixels}", result)

    with parallel(y.n) as n, parallel(y.h) as row, loop(-(-y.w // pixels)) as tile:
        place = (n, row, minimum(tile * pixels, y.w - pixels))
        if y.lanes == 1:
            kind = f"{y.dtype}x{pixels}" if pixels > 1 else y.dtype
            value = tirx.Cast(kind, codes(place, 0))
        else:
            value = word(place)
        store(target, y.offset(n, 0, row, place[2]), value, y.lanes * pixels)


def _dequantize(op: DequantizeOp, knobs: Knobs, source: Any, target: Any) -> None:
    lanes = knobs["lanes"]
    integer, floating = (f"{t}x{lanes}" if lanes > 1 else t for t in ("int32", "float32"))

    def visit(place: Any, channel: Any) -> None:
        codes = tirx.Cast(integer, load(source, _at(op.x, place, channel), lanes))
        centred = codes - splat(tirx.const(op.x.zero, "int32"), lanes)
        value = tirx.Cast(floating, centred) * splat(float32(op.scale), lanes)
        store(target, _at(op.y, place, channel), value, lanes)

    _over(op.y, lanes, visit)


def _spread(op: MoveOp, lanes: int, source: Any, target: Any) -> None:
    """Channels to pixels."""
    x, s = op.inputs[0], op.spread

    def visit(place: Any, channel: Any) -> None:
        n, row, column = place
        with loop(s) as v, loop(s) as w:
            phase = v * s + w
            first = channel * s * s + phase if op.interleave else phase * op.y.c + channel
            value = load(source, _at(x, place, first), lanes)
            store(target, _at(op.y, (n, row * s + v, column * s + w), channel), value, lanes)

    _over(Blocked(x.n, op.y.c, x.h, x.w, op.y.c), lanes, visit)


def _move(op: MoveOp, knobs: Knobs) -> Any:
    lanes, (fy, fx) = knobs["lanes"], op.factors

    def body(*buffers: Any) -> None:
        *sources, target = buffers
        if op.spread > 1:
            _spread(op, lanes, sources[0], target)
            zero_border(op.y, target)
            return
        first = 0
        for x, source in zip(op.inputs, sources, strict=True):

            def visit(
                place: Any, channel: Any, x: Blocked = x, source: Any = source, first: int = first
            ) -> None:
                n, row, column = place
                value = load(source, _at(x, (n, row // fy, column // fx), channel), lanes)
                store(target, _at(op.y, place, first + channel), value, lanes)

            last = x is op.inputs[-1]
            channels = min(x.lanes, op.y.lanes - first) if last and lanes > 1 else x.c
            part = Blocked(op.y.n, channels, op.y.h, op.y.w, channels)
            _over(part, lanes, visit)
            first += x.c
        zero_border(op.y, target)

    arguments = [(f"x{i}", x.elements, x.dtype) for i, x in enumerate(op.inputs)]
    arguments.append(("y", op.y.elements, op.y.dtype))
    concatenates, grows = len(op.inputs) > 1, op.factors != (1, 1)
    name = "q_concat" if concatenates else "q_upsample" if grows else "q_relayout"
    if op.spread > 1:
        name = "q_depth_to_space"
    return kernel(name, arguments, body)


TEMPLATE = KernelTemplate(
    name="codes", matches=matches, default=default, emit=emit, accumulator="none"
)
