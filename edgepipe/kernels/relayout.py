"""Copies between layouts of one tensor (plain NCHW, blocked, padded) and channel concatenation.

These are what a good layout choice avoids; the manifest counts the ones that remain.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import float32, kernel, load, loop, store, zero_border
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

    with loop(y.n) as n, loop(y.blocks) as block, loop(y.h) as row, loop(y.w) as column:
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
    with loop(x.n) as n, loop(x.blocks) as block, loop(x.h) as row, loop(x.w) as column:
        value = load(source, x.offset(n, block, row, column), x.lanes)
        store(target, y.offset(n, first_block + block, row, column), value, x.lanes)


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
        else:
            _copy(op.x, op.y, sources[0], target)

    arguments = [(f"x{i}", x.elements, "float32") for i, x in enumerate(inputs)]
    arguments.append(("y", op.y.elements, "float32"))
    return kernel("concat" if isinstance(op, ConcatOp) else "relayout", arguments, body)


TEMPLATE = KernelTemplate(
    name="relayout", matches=matches, default=default, emit=emit, accumulator="none"
)
