"""Sums, products, functions and windows of codes, a thread for four channels of a pixel."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import Registers, float32, kernel, loop
from edgepipe.kernels.cuda.threads import zeros
from edgepipe.kernels.cuda.words import (
    addends,
    at,
    codes,
    each,
    held,
    operand,
    put,
    put_codes,
    scaled,
    width,
)
from edgepipe.kernels.integer_ops import QAddOp, QMulOp, QPoolOp, QTableOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QAddOp | QMulOp | QTableOp | QPoolOp):
        return ""
    return "its operands are not in NHWC" if any(x.blocks > 1 for x in _inputs(op)) else None


def default(op: Any, target: Target) -> Knobs:
    return {"lanes": width(*_inputs(op), op.y)}


def _inputs(op: Any) -> list[Blocked]:
    if isinstance(op, QAddOp):
        return [a.layout for a in op.addends]
    return [op.a, op.b] if isinstance(op, QMulOp) else [op.x]


def emit(op: Any, knobs: Knobs) -> Any:
    lanes = knobs["lanes"]
    arguments = [(f"x{i}", x.elements, x.dtype) for i, x in enumerate(_inputs(op))]
    if isinstance(op, QTableOp):
        arguments.append(("table", 256, op.y.dtype))
    arguments.append(("y", op.y.elements, op.y.dtype))

    def body(*buffers: Any) -> None:
        *sources, target = buffers

        def compute(place: Any, channel: Any) -> None:
            if isinstance(op, QTableOp):
                values = _looked_up(op, sources, place, channel, lanes)
            elif isinstance(op, QPoolOp) and op.kind == "max":
                values = _largest(op, sources[0], place, channel, lanes)
            else:
                sums = _float_sums(op, sources, place, channel, lanes)
                put(target, op.y, place, channel, sums, op.limits)
                return
            put_codes(target, at(op.y, place, channel), values)

        each(op.y, lanes, target, compute)

    names = {QAddOp: "q_add", QMulOp: "q_mul", QTableOp: "q_table"}
    return kernel(names.get(type(op)) or f"q_{op.kind}_pool", arguments, body)


def _float_sums(op: Any, sources: list[Any], place: Any, channel: Any, lanes: int) -> list[Any]:
    if isinstance(op, QAddOp):
        return _sums(op, sources, place, channel, lanes)
    find = _products if isinstance(op, QMulOp) else _means
    return find(op, sources, place, channel, lanes)


def _sums(op: QAddOp, sources: list[Any], place: Any, channel: Any, lanes: int) -> list[Any]:
    parts = [
        addends(buffer, residual, place, channel, lanes)
        for buffer, residual in zip(sources, op.addends, strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = [a + b for a, b in zip(total, part, strict=True)]
    return total


def _products(op: QMulOp, sources: list[Any], place: Any, channel: Any, lanes: int) -> list[Any]:
    a, b = (
        [code - layout.zero for code in codes(buffer, operand(layout, place, channel), lanes)]
        for buffer, layout in zip(sources, (op.a, op.b), strict=True)
    )
    return [scaled(x * y, float32(op.multiplier)) for x, y in zip(a, b, strict=True)]


def _looked_up(op: QTableOp, sources: list[Any], place: Any, channel: Any, lanes: int) -> list[Any]:
    lowest = -128 if op.x.dtype == "int8" else 0
    found = codes(sources[0], operand(op.x, place, channel), lanes)
    return [tirx.Cast("int32", sources[1][code - lowest]) for code in found]


def _tap(op: QPoolOp, source: Any, place: Any, channel: Any, lanes: int) -> list[Any]:
    n, row, column = place
    return codes(source, op.x.offset(n, 0, row, column) + held(op.x, channel), lanes)


def _corner(op: QPoolOp, place: Any) -> tuple[Any, Any, Any]:
    n, row, column = place
    return n, row * op.strides[0] - op.offset[0], column * op.strides[1] - op.offset[1]


def _largest(op: QPoolOp, source: Any, place: Any, channel: Any, lanes: int) -> list[Any]:
    """Coordinates are clamped to the input: elements repeat, the border takes no part."""
    n, top, left = _corner(op, place)
    best = Registers(lanes, 1, "int32")
    for lane in range(lanes):
        best[lane] = tirx.const(-129, "int32")
    with loop(op.kernel[0]) as ky, loop(op.kernel[1]) as kx:
        row = tirx.min(tirx.max(top + ky, 0), op.x.h - 1)
        column = tirx.min(tirx.max(left + kx, 0), op.x.w - 1)
        for lane, code in enumerate(_tap(op, source, (n, row, column), channel, lanes)):
            best[lane] = tirx.max(best[lane], code)
    return [best[lane] for lane in range(lanes)]


def _means(op: QPoolOp, sources: list[Any], place: Any, channel: Any, lanes: int) -> list[Any]:
    """The border holds the zero point: a window's sum less its size times that is what counts."""
    n, top, left = _corner(op, place)
    (kh, kw), total = op.kernel, zeros(lanes, 1, "int32")
    with loop(kh) as ky, loop(kw) as kx:
        for lane, code in enumerate(_tap(op, sources[0], (n, top + ky, left + kx), channel, lanes)):
            total[lane] = total[lane] + code
    whole = kh * kw * op.x.zero
    return [scaled(total[lane] - whole, float32(op.multiplier)) for lane in range(lanes)]


TEMPLATE = KernelTemplate(
    name="q_elementwise",
    matches=matches,
    default=default,
    emit=emit,
    arithmetic="int8",
    accumulator="int32",
)
