"""Copies between layouts of one tensor (plain NCHW, blocked, padded) and channel concatenation.

These are what a good layout choice avoids; the manifest counts the ones that remain.
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
    minimum,
    parallel,
    store,
    zero_border,
)
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConcatOp, Op, RelayoutOp
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, RelayoutOp | ConcatOp) else ""


def default(op: RelayoutOp | ConcatOp, target: Target) -> Knobs:
    return {}


def _copy(x: Blocked, y: Blocked, source: Any, target: Any) -> None:
    """Element by element over the channels of ``y``; lanes past the last channel become zero."""

    def element(n: Any, channel: Any, row: Any, column: Any) -> Any:
        offset = x.offset(n, channel // x.lanes, row, column) + channel % x.lanes
        return source[offset]

    with (
        parallel(y.n) as n,
        parallel(y.blocks) as block,
        parallel(y.h) as row,
        loop(y.w) as column,
    ):
        at = y.offset(n, block, row, column)
        whole, tail = divmod(y.c, y.lanes)
        for lane in range(y.lanes):
            channel = block * y.lanes + lane
            if tail and lane >= tail:  # part-filled in the last block only
                if whole == 0:
                    value: Any = float32(0)
                else:
                    safe = tirx.min(channel, y.c - 1)
                    value = tirx.Select(channel < y.c, element(n, safe, row, column), float32(0))
            else:
                value = element(n, channel, row, column)
            store(target, at + lane, value, 1)
    zero_border(y, target)


def _copy_blocks(x: Blocked, y: Blocked, source: Any, target: Any, first_block: int) -> None:
    with (
        parallel(x.n) as n,
        parallel(x.blocks) as block,
        parallel(x.h) as row,
        loop(x.w) as column,
    ):
        value = load(source, x.offset(n, block, row, column), x.lanes)
        store(target, y.offset(n, first_block + block, row, column), value, x.lanes)


def _transposes(x: Blocked, y: Blocked) -> bool:
    """Whether this is a copy between planes and whole vectors of channels and pixels."""
    lanes = max(x.lanes, y.lanes)
    pixels = y.w if x.padded or y.padded else y.h * y.w
    if min(x.lanes, y.lanes) > 1 or lanes & (lanes - 1) or not pixels >= lanes > 1:
        return False
    return y.lanes == 1 or y.c % lanes == 0  # lanes past the last channel become zero


def _transpose(x: Blocked, y: Blocked, source: Any, target: Any) -> None:
    """Squares of ``lanes`` channels x ``lanes`` pixels, by log2(lanes) exchanges of halves.

    The last square of a row overlaps its neighbour. What is past the last channel is stored to its
    plane, before its own values are.
    """
    lanes = max(x.lanes, y.lanes)
    rows, columns = (y.h, y.w) if x.padded or y.padded else (1, y.h * y.w)
    blocks = -(-y.c // lanes)

    def place(layout: Blocked, at: tuple[Any, Any, Any, Any], i: int) -> Any:
        n, block, row, column = at
        if layout.lanes > 1:
            return layout.offset(n, block, row, column + i)
        channel = block * lanes + i
        channel = channel if y.c % lanes == 0 else tirx.min(channel, y.c - 1)
        return layout.offset(n, channel, row, column)

    with (
        parallel(y.n) as n,
        parallel(blocks) as block,
        parallel(rows) as row,
        loop(-(-columns // lanes)) as c,
    ):
        at = (n, block, row, minimum(c * lanes, columns - lanes))
        square = Registers(lanes, lanes)
        for i in range(lanes):
            square[i] = load(source, place(x, at, i), lanes)
        step = 1
        while step < lanes:
            for i in (i for i in range(lanes) if not i & step):
                low, high = Registers(1, lanes), Registers(1, lanes)
                pair = [square[i], square[i + step]]
                own = range(lanes)
                low[0] = tirx.Shuffle(pair, [lanes + j - step if j & step else j for j in own])
                high[0] = tirx.Shuffle(pair, [lanes + j if j & step else j + step for j in own])
                square[i], square[i + step] = low[0], high[0]
            step *= 2
        for i in reversed(range(lanes)):
            store(target, place(y, at, i), square[i], lanes)
    zero_border(y, target)


def emit(op: RelayoutOp | ConcatOp, knobs: Knobs) -> Any:
    inputs = (op.x,) if isinstance(op, RelayoutOp) else op.inputs

    def body(*buffers: Any) -> None:
        *sources, target = buffers
        if isinstance(op, ConcatOp):
            first = 0
            for x, source in zip(inputs, sources, strict=True):
                _copy_blocks(x, op.y, source, target, first)
                first += x.blocks
            zero_border(op.y, target)
        elif op.x.lanes == op.y.lanes:
            _copy_blocks(op.x, op.y, sources[0], target, 0)
            zero_border(op.y, target)
        elif _transposes(op.x, op.y):
            _transpose(op.x, op.y, sources[0], target)
        else:
            _copy(op.x, op.y, sources[0], target)

    arguments = [(f"x{i}", x.elements, "float32") for i, x in enumerate(inputs)]
    arguments.append(("y", op.y.elements, "float32"))
    return kernel("concat" if isinstance(op, ConcatOp) else "relayout", arguments, body)


TEMPLATE = KernelTemplate(
    name="relayout", matches=matches, default=default, emit=emit, accumulator="none"
)
