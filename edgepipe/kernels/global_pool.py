"""Global average and maximum pooling over blocked layouts; sums are taken row by row."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import (
    Registers,
    float32,
    kernel,
    load,
    loop,
    parallel,
    splat,
    zero_border,
)
from edgepipe.kernels.ops import GlobalPoolOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, GlobalPoolOp) else ""


def default(op: GlobalPoolOp, target: Target) -> Knobs:
    return {}


def emit(op: GlobalPoolOp, knobs: Knobs) -> Any:
    x, y, lanes = op.x, op.y, op.y.lanes

    def body(*buffers: Any) -> None:
        source, *residuals, target = buffers
        with parallel(y.n) as n, parallel(y.blocks) as block:
            # A sum per row, then their sum: rounding grows with h + w, not with h * w.
            total, row_sum = Registers(1, lanes), Registers(1, lanes)
            first = load(source, x.offset(n, block, 0, 0), lanes)
            total[0] = first if op.kind == "max" else splat(float32(0), lanes)
            with loop(x.h) as row:
                if op.kind == "max":
                    with loop(x.w) as column:
                        value = load(source, x.offset(n, block, row, column), lanes)
                        total[0] = tirx.max(total[0], value)
                else:
                    row_sum[0] = splat(float32(0), lanes)
                    with loop(x.w) as column:
                        value = load(source, x.offset(n, block, row, column), lanes)
                        row_sum[0] = row_sum[0] + value
                    total[0] = total[0] + row_sum[0]
            result = total[0]
            if op.kind == "average":
                result = result * splat(float32(1 / (x.h * x.w)), lanes)
            finish(op, residuals, target, (n, block, 0, 0), result)
        zero_border(y, target)

    return kernel(f"global_{op.kind}_pool", signature(op, [("x", x.elements, "float32")]), body)


TEMPLATE = KernelTemplate(name="global_pool", matches=matches, default=default, emit=emit)
