"""Copies between layouts and channel concatenation, one thread per output vector."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import float32, kernel
from edgepipe.kernels.cuda.threads import (
    THREADS,
    each_vector,
    fill_border,
    launch,
    read,
    write,
)
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConcatOp, Op, RelayoutOp
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, RelayoutOp | ConcatOp) else ""


def default(op: RelayoutOp | ConcatOp, target: Target) -> Knobs:
    return {}


def emit(op: RelayoutOp | ConcatOp, knobs: Knobs) -> Any:
    inputs = (op.x,) if isinstance(op, RelayoutOp) else op.inputs

    def body(*buffers: Any) -> None:
        *sources, target = buffers
        first = 0
        for x, source in zip(inputs, sources, strict=True):
            part = Blocked(x.n, x.c, x.h, x.w, op.y.lanes)
            each_vector(part, None, _copy(x, op.y, source, target, first))
            first += x.blocks
        _border(op.y, target)

    arguments = [(f"x{i}", x.elements, x.dtype) for i, x in enumerate(inputs)]
    arguments.append(("y", op.y.elements, op.y.dtype))
    return kernel("concat" if isinstance(op, ConcatOp) else "relayout", arguments, body)


def _border(y: Blocked, target: Any) -> None:
    if y.padded:
        count = y.n * y.blocks * (y.rows * y.cols - y.h * y.w)
        blocks = -(-count // THREADS)
        with launch((blocks,), THREADS) as (block, _, _, thread):
            fill_border(y, target, block * THREADS + thread, blocks * THREADS)


def _copy(x: Blocked, y: Blocked, source: Any, target: Any, first: int) -> Any:
    def compute(n: Any, block: Any, row: Any, column: Any) -> None:
        at = y.offset(n, first + block, row, column)
        if x.lanes == y.lanes:
            value = read(source, x.offset(n, block, row, column), x.lanes)
            write(target, at, value, x.lanes)
            return
        for lane in range(y.lanes):
            channel = block * y.lanes + lane
            safe = tirx.min(channel, y.c - 1) if y.c % y.lanes else channel
            place = x.offset(n, safe // x.lanes, row, column) + safe % x.lanes
            value = read(source, place, 1)
            if y.c % y.lanes:
                value = tirx.Select(channel < y.c, value, float32(0))
            write(target, at + lane, value, 1)

    return compute


TEMPLATE = KernelTemplate(
    name="relayout", matches=matches, default=default, emit=emit, accumulator="none"
)
