"""A row times a constant matrix: dense layers of one sample, which only read their weights.

Threads side by side take neighbouring columns, four each where rows are whole vectors; the depth
is cut into slices that meet in shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import Registers, kernel, splat, store
from edgepipe.kernels.cuda import matmul
from edgepipe.kernels.cuda.threads import (
    LANES,
    WARP,
    barrier,
    launch,
    read,
    shared,
    when,
    write,
    zeros,
)
from edgepipe.kernels.cuda.weights import row_values, scaled, unsupported
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Slices of the depth: warps of a block.
SLICES = 8


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, MatmulOp) or not op.constant or op.batch * op.m > 1:
        return ""
    return unsupported(op.weights)


def default(op: MatmulOp, target: Target) -> Knobs:
    return {"lanes": LANES if op.n % LANES == 0 else 1}


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    arguments = matmul.arguments_of(op, op.k * op.n)
    return kernel("dense", arguments, lambda *held: _emit(op, knobs["lanes"], held))


def _emit(op: MatmulOp, lanes: int, buffers: Sequence[Any]) -> None:
    a, *rest, y = buffers
    weights, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
    bias, residuals = (rest[0], rest[1:]) if op.bias else (None, rest)
    vectors = op.n // lanes
    with launch((-(-vectors // WARP),), WARP * SLICES) as (block, _, _, thread):
        lane, part = thread % WARP, thread // WARP
        vector = block * WARP + lane
        safe = tirx.min(vector, vectors - 1) if vectors % WARP else vector
        memory, sums = shared(WARP * SLICES * lanes), zeros(1, lanes)
        with T.serial(0, -(-op.k // SLICES)) as turn:
            k = turn * SLICES + part
            with when(True if op.k % SLICES == 0 else k < op.k):
                row = row_values(weights[0], k * op.n + safe * lanes, lanes)
                sums[0] = sums[0] + row * splat(read(a, k, 1), lanes)
        store(memory, thread * lanes, sums[0], lanes)
        barrier()
        with when(tirx.all(part < 1, vector < vectors)):
            total = Registers(1, lanes)
            total[0] = sums[0]
            with T.serial(1, SLICES) as other:
                total[0] = total[0] + read(memory, (other * WARP + lane) * lanes, lanes)
            for i in range(lanes):
                column = vector * lanes + i
                value = scaled(op.weights, weights, column, total.lane(0, i), 1)
                value = value if bias is None else value + bias[column]
                operands = [read(r, column, 1) for r in residuals]
                write(y, column, apply(op.epilogue, value, 1, operands), 1)


TEMPLATE = KernelTemplate(
    name="gemv", matches=matches, default=default, emit=emit, pack=matmul.pack, rank=3
)
