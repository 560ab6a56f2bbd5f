"""Elementwise operators over blocked layouts, and nearest upsampling, which is one with a stride."""

from __future__ import annotations

from typing import Any

from edgepipe.kernels.builder import kernel, load, loop, operand_offset, store, zero_border
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import MapOp, Op, UpsampleOp
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
        with loop(y.n) as n, loop(y.blocks) as block, loop(y.h) as row, loop(y.w) as column:
            value = load(source, operand_offset(x, n, block, row // fy, column // fx), lanes)
            operands = [
                load(buffer, operand_offset(layout, n, block, row, column), lanes)
                for buffer, layout in zip(residuals, op.residuals, strict=True)
            ]
            value = apply(op.epilogue, value, lanes, operands)
            store(target, y.offset(n, block, row, column), value, lanes)
        zero_border(y, target)

    arguments = [("x", x.elements, "float32")]
    arguments += [(f"r{i}", r.elements, "float32") for i, r in enumerate(op.residuals)]
    arguments.append(("y", y.elements, "float32"))
    return kernel("upsample" if isinstance(op, UpsampleOp) else "map", arguments, body)


TEMPLATE = KernelTemplate(
    name="map", matches=matches, default=default, emit=emit, accumulator="none"
)
