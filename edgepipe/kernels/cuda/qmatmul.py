"""Products of two tensors of codes (attention): a thread for four columns, or one, of a row."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import float32, kernel
from edgepipe.kernels.cuda.threads import LANES, parallel, zeros
from edgepipe.kernels.cuda.words import codes, put, scaled
from edgepipe.kernels.integer_ops import QMatmulOp
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    return None if isinstance(op, QMatmulOp) else ""


def default(op: QMatmulOp, target: Target) -> Knobs:
    return {"lanes": LANES if op.n % LANES == 0 else 1}


def emit(op: QMatmulOp, knobs: Knobs) -> Any:
    lanes = knobs["lanes"]

    def body(a: Any, b: Any, y: Any) -> None:
        with parallel(op.batch * op.m * (op.n // lanes)) as index:
            column, row = index % (op.n // lanes) * lanes, index // (op.n // lanes)
            matrix = row // op.m if op.b_batch > 1 else 0
            sums = zeros(lanes, 1, "int32")
            with T.serial(0, op.k) as k:
                (left,) = codes(a, row * op.k + k, 1)
                right = codes(b, (matrix * op.k + k) * op.n + column, lanes)
                for lane, code in enumerate(right):
                    sums[lane] = sums[lane] + (left - op.a.zero) * (code - op.b.zero)
            values = [scaled(sums[lane], float32(op.multiplier)) for lane in range(lanes)]
            # Rows lie one behind the other, whatever samples they belong to.
            put(y, op.y, (0, 0, row), column, values, op.limits)

    sizes = [("a", op.a.elements, op.a.dtype), ("b", op.b.elements, op.b.dtype)]
    return kernel("q_matmul", [*sizes, ("y", op.y.elements, op.y.dtype)], body)


TEMPLATE = KernelTemplate(
    name="q_matmul",
    matches=matches,
    default=default,
    emit=emit,
    arithmetic="int8",
    accumulator="int32",
)
