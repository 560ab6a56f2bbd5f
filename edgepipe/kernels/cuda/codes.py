"""Codes into and out of integer regions, and from one layout to another."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import float32, kernel, store
from edgepipe.kernels.cuda.threads import LANES, THREADS, fill_border, launch
from edgepipe.kernels.cuda.words import at, codes, each, put, put_codes
from edgepipe.kernels.integer_ops import DequantizeOp, Limits, MoveOp, QuantizeOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

_RANGE = {"int8": (-128, 127), "uint8": (0, 255)}


def matches(op: Any, target: Target) -> str | None:
    return None if isinstance(op, QuantizeOp | DequantizeOp | MoveOp) else ""


def default(op: Any, target: Target) -> Knobs:
    if isinstance(op, MoveOp):
        return {"lanes": 1 if op.spread > 1 else _words([*op.inputs, op.y])}
    return {"lanes": _words([op.x, op.y])}


def _words(layouts: list[Blocked]) -> int:
    """Four channels at a time where they lie side by side everywhere, and end together."""
    fine = all(x.lanes % LANES == 0 and x.c % LANES == 0 for x in layouts)
    return LANES if fine else 1


def emit(op: Any, knobs: Knobs) -> Any:
    lanes = knobs["lanes"]
    if isinstance(op, MoveOp):
        return _move(op, lanes)
    name = "quantize" if isinstance(op, QuantizeOp) else "dequantize"
    arguments = [("x", op.x.elements, op.x.dtype), ("y", op.y.elements, op.y.dtype)]

    def body(source: Any, target: Any) -> None:
        def compute(place: Any, channel: Any) -> None:
            move = _quantize if isinstance(op, QuantizeOp) else _dequantize
            move(op, source, target, place, channel, lanes)

        each(op.y, lanes, target, compute, channels=op.y.c)

    return kernel(name, arguments, body)


def _quantize(
    op: QuantizeOp, source: Any, target: Any, place: Any, channel: Any, lanes: int
) -> None:
    low, high = (end - op.y.zero for end in _RANGE[op.y.dtype])
    first = at(op.x, place, channel)
    sums = [tirx.Cast("float32", source[first + i]) / float32(op.scale) for i in range(lanes)]
    put(target, op.y, place, channel, sums, Limits(low, high))


def _dequantize(
    op: DequantizeOp, source: Any, target: Any, place: Any, channel: Any, lanes: int
) -> None:
    first = at(op.y, place, channel)
    for i, code in enumerate(codes(source, at(op.x, place, channel), lanes)):
        value = tirx.Cast("float32", code - op.x.zero) * float32(op.scale)
        store(target, first + i, tirx.Cast(op.y.dtype, value), 1)


def _move(op: MoveOp, lanes: int) -> Any:
    (fy, fx), s = op.factors, op.spread

    def body(*buffers: Any) -> None:
        *sources, target = buffers
        first = 0
        for x, source in zip(op.inputs, sources, strict=True):

            def copy(
                place: Any, channel: Any, x: Blocked = x, source: Any = source, first: int = first
            ) -> None:
                n, row, column = place
                origin = (n, row // fy, column // fx), channel
                if s > 1:
                    phase = row % s * s + column % s
                    part = channel * s * s + phase if op.interleave else phase * op.y.c + channel
                    origin = (n, row // s, column // s), part
                found = codes(source, at(x, *origin), lanes)
                put_codes(target, at(op.y, place, first + channel), found)

            channels = op.y.c if s > 1 else x.c
            each(op.y, lanes, target, copy, channels=channels, border=False)
            first += x.c
        _border(op.y, target)

    arguments = [(f"x{i}", x.elements, x.dtype) for i, x in enumerate(op.inputs)]
    arguments.append(("y", op.y.elements, op.y.dtype))
    name = "q_depth_to_space" if s > 1 else "q_upsample" if op.factors != (1, 1) else "q_relayout"
    return kernel("q_concat" if len(op.inputs) > 1 else name, arguments, body)


def _border(y: Blocked, target: Any) -> None:
    if not y.padded:
        return
    count = y.n * y.blocks * (y.rows * y.cols - y.h * y.w) * -(-y.lanes // LANES)
    blocks = -(-count // THREADS)
    with launch((blocks,), THREADS) as (block, _, _, thread):
        fill_border(y, target, block * THREADS + thread, blocks * THREADS)


TEMPLATE = KernelTemplate(
    name="codes", matches=matches, default=default, emit=emit, accumulator="none"
)
