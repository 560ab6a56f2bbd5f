"""Sums, products and functions of codes, element by element over NHWC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import (
    float32,
    kernel,
    load,
    loop,
    minimum,
    operand_offset,
    parallel,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.dot import intrinsic
from edgepipe.kernels.integer_ops import QAddOp, QMulOp, QTableOp, Residual
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.requantize import addend, put, scaled
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QAddOp | QMulOp | QTableOp):
        return ""
    if any(layout.blocks > 1 for layout in _inputs(op)):
        return "its operands are not in NHWC"
    return None


def default(op: Any, target: Target) -> Knobs:
    lanes = vector([*_inputs(op), op.y])
    return {"lanes": lanes, "arch": target.arch}


def width(channels: int) -> int:
    """The widest vector of bytes, 16 at most, that divides a pixel's channels."""
    return next(v for v in (16, 8, 4, 2, 1) if channels % v == 0)


def vector(layouts: Sequence[Blocked]) -> int:
    """Bytes of the vectors that walk the channels of all ``layouts``.

    Sixteen where each holds the same channels in one block: the last vector of a pixel overlaps
    its neighbour, and stores the same values twice.
    """
    channels = layouts[0].lanes
    if channels > 16 and all(x.blocks == 1 and x.lanes == channels for x in layouts):
        return 16
    return min(width(x.lanes) for x in layouts)


def _inputs(op: Any) -> list[Blocked]:
    if isinstance(op, QAddOp):
        return [a.layout for a in op.addends]
    return [op.a, op.b] if isinstance(op, QMulOp) else [op.x]


def over_channels(y: Blocked, lanes: int, visit: Callable[[Any, Any], None]) -> None:
    """Call ``visit((n, row, column), channel)`` for every vector of ``y``."""
    channels = y.lanes * y.blocks
    chunks = -(-channels // lanes)
    with parallel(y.n) as n, parallel(y.h) as row, parallel(y.w) as column, loop(chunks) as chunk:
        first = chunk * lanes
        visit((n, row, column), minimum(first, channels - lanes) if channels % lanes else first)


def emit(op: Any, knobs: Knobs) -> Any:
    lanes, arch = knobs["lanes"], knobs["arch"]
    arguments = [(f"x{i}", x.elements, x.dtype) for i, x in enumerate(_inputs(op))]
    if isinstance(op, QTableOp):
        arguments.append(("table", 256, op.y.dtype))
    arguments.append(("y", op.y.elements, op.y.dtype))

    def body(*buffers: Any) -> None:
        *sources, target = buffers

        def visit(place: Any, channel: Any) -> None:
            if isinstance(op, QTableOp):
                if arch == "aarch64" and lanes in (8, 16):
                    _look_up_vector(op, sources, target, place, channel, lanes)
                else:
                    _look_up(op, sources, target, place, channel, lanes)
                return
            if isinstance(op, QAddOp):
                value = _sum(op.addends, sources, place, channel, lanes)
            else:
                value = _product(op, sources, place, channel, lanes)
            put(target, op.y, place, channel, [value], op.limits, arch, lanes)

        over_channels(op.y, lanes, visit)
        zero_border(op.y, target)

    name = {QAddOp: "q_add", QMulOp: "q_mul", QTableOp: "q_table"}[type(op)]
    return kernel(name, arguments, body)


def _sum(
    addends: tuple[Residual, ...], sources: list[Any], place: Any, channel: Any, lanes: int
) -> Any:
    n, row, column = place
    total: Any = None
    for buffer, residual in zip(sources, addends, strict=True):
        value = addend(buffer, residual, (n, 0, row, column), channel, lanes)
        total = value if total is None else total + value
    return total


def _product(op: QMulOp, sources: list[Any], place: Any, channel: Any, lanes: int) -> Any:
    n, row, column = place
    factors = []
    for buffer, layout in zip(sources, (op.a, op.b), strict=True):
        codes = load(buffer, operand_offset(layout, n, 0, row, column) + channel, lanes)
        wide = tirx.Cast(f"int32x{lanes}" if lanes > 1 else "int32", codes)
        factors.append(wide - splat(tirx.const(layout.zero, "int32"), lanes))
    multiplier = splat(float32(op.multiplier), lanes)
    return scaled(factors[0] * factors[1], multiplier, lanes, fence=False)


def _look_up(
    op: QTableOp, sources: list[Any], target: Any, place: Any, channel: Any, lanes: int
) -> None:
    codes, table = sources
    lowest = -128 if op.x.dtype == "int8" else 0
    n, row, column = place
    for lane in range(lanes):
        code = codes[op.x.offset(n, 0, row, column) + channel + lane]
        index = tirx.Cast("int32", code) - tirx.const(lowest, "int32")
        store(target, op.y.offset(n, 0, row, column) + channel + lane, table[index], 1)


def _look_up_vector(
    op: QTableOp, sources: list[Any], target: Any, place: Any, channel: Any, lanes: int
) -> None:
    """AArch64 looks a vector of indices up in 64 bytes of registers: TBL gives 0 outside of them,
    TBX leaves what is there. LLVM keeps the 256 bytes in registers, outside of the loops."""
    assert op.x.dtype == op.y.dtype == "int8", "Arm stores codes signed"
    codes, table = sources
    n, row, column = place
    index = load(codes, op.x.offset(n, 0, row, column) + channel, lanes)
    found: Any = None
    # To TBL a negative code is an index from 128 on; in the table it comes before the others.
    for first, past in ((128, 0), (192, 64), (0, -128), (64, -64)):
        rows = [load(table, first + 16 * i, 16) for i in range(4)]
        near = index - splat(tirx.const(past, "int8"), lanes) if past else index
        held = [] if found is None else [found]
        name = "aarch64.neon.tbx4" if held else "aarch64.neon.tbl4"
        found = intrinsic(f"int8x{lanes}", name, *held, *rows, near)
    store(target, op.y.offset(n, 0, row, column) + channel, found, lanes)


TEMPLATE = KernelTemplate(
    name="q_elementwise",
    matches=matches,
    default=default,
    emit=emit,
    arithmetic="int8",
    accumulator="int32",
)
