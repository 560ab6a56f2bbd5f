"""Elementwise operators over blocked layouts; nearest upsampling is one that repeats pixels."""

from __future__ import annotations

from typing import Any

from edgepipe.kernels.builder import kernel, load, loop, operand_offset, parallel, zero_border
from edgepipe.kernels.ops import MapOp, Op, UpsampleOp
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, MapOp | UpsampleOp) else ""


def default(op: MapOp | UpsampleOp, target: Target) -> Knobs:
    return {}


def emit(op: MapOp | UpsampleOp, knobs: Knobs) -> Any:
    x, y, lanes = op.x, op.y, op.y.lanes
    fy, fx = op.factors if isinstance(op, UpsampleOp) else (1, 1)

    def body(*buffers: Any) -> None:
        source, *residuals, target = buffers
        with (
            parallel(y.n) as n,
            parallel(y.blocks) as block,
            parallel(y.h) as row,
            loop(y.w) as column,
        ):
            value = load(source, operand_offset(x, n, block, row // fy, column // fx), lanes)
            finish(op, residuals, target, (n, block, row, column), value)
        zero_border(y, target)

    name = "upsample" if isinstance(op, UpsampleOp) else "map"
    return kernel(name, signature(op, [("x", x.elements, "float32")]), body)


TEMPLATE = KernelTemplate(
    name="map", matches=matches, default=default, emit=emit, accumulator="none"
)
