"""Row-major matrix products: ``m`` of the tile counts columns, ``n`` rows of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels.builder import Registers, float32, kernel, store
from edgepipe.kernels.cuda.threads import LANES, when
from edgepipe.kernels.cuda.tile import Tile, choose, product, settings, spread
from edgepipe.kernels.cuda.weights import arguments, packed, row_values, scaled, unsupported
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return unsupported(op.weights) if isinstance(op, MatmulOp) else ""


def default(op: MatmulOp, target: Target) -> Knobs:
    assert target.cuda is not None
    return choose(op.n, op.m, op.batch, target.cuda.processors).knobs()


def knobs(op: MatmulOp, target: Target) -> list[Knobs]:
    return settings(default(op, target))


def executed(op: MatmulOp, knobs: Knobs) -> int:
    tile = Tile.of(knobs)
    rows, columns, depth = (-(-size // part) * part for size, part in
                            ((op.m, tile.bn), (op.n, tile.bm), (op.k, tile.k)))  # fmt: skip
    return op.batch * rows * columns * depth


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` stays as it is, in the element type of its format."""
    if not op.constant:
        return list(arrays)
    weight, *rest = arrays
    return [packed(op.weights, weight), *(np.ascontiguousarray(r, np.float32) for r in rest)]


def arguments_of(op: MatmulOp) -> list[tuple[str, int, str]]:
    """Buffers of a product in their order."""
    inputs = [("a", (op.batch if op.a_batched else 1) * op.m * op.k, "float32")]
    if op.constant:
        inputs += arguments(op.weights, op.k * op.n, op.n)
    else:
        inputs.append(("b", (op.batch if op.b_batched else 1) * op.k * op.n, "float32"))
    inputs += [("bias", op.n, "float32")] if op.bias else []
    sizes = {"full": op.batch * op.m * op.n, "row": op.n}
    inputs += [(f"r{i}", sizes[kind], "float32") for i, kind in enumerate(op.residuals)]
    return [*inputs, ("y", op.batch * op.m * op.n, "float32")]


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    tile, name = Tile.of(knobs), "dense" if op.constant else "matmul"
    return kernel(name, arguments_of(op), lambda *buffers: _emit(op, tile, buffers))


def _emit(op: MatmulOp, tile: Tile, buffers: Sequence[Any]) -> None:
    a, *rest, y = buffers
    weights, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
    bias, residuals = (rest[0], rest[1:]) if op.bias else (None, rest)

    def inside(index: Any, extent: int, step: int, value: Any) -> Any:
        return value if extent % step == 0 else tirx.if_then_else(index < extent, value, float32(0))

    def fill(at: Any, step: Any, left: Any, right: Any, thread: Any) -> None:
        def weight(i: Any) -> None:
            k, column = step * tile.k + i // tile.bm, at[1] * tile.bm + i % tile.bm
            batch = at[2] if op.b_batched else 0
            safe = tirx.min(column, op.n - 1) if op.n % tile.bm else column
            row = tirx.min(k, op.k - 1) if op.k % tile.k else k
            value = row_values(weights[0], (batch * op.k + row) * op.n + safe, 1)
            store(left, i, inside(k, op.k, tile.k, value), 1)

        def activation(i: Any) -> None:
            k, row = step * tile.k + i % tile.k, at[0] * tile.bn + i // tile.k
            batch = at[2] if op.a_batched else 0
            safe = tirx.min(row, op.m - 1) if op.m % tile.bn else row
            column = tirx.min(k, op.k - 1) if op.k % tile.k else k
            value = a[(batch * op.m + safe) * op.k + column]
            store(right, i % tile.k * tile.bn + i // tile.k, inside(k, op.k, tile.k, value), 1)

        spread(tile.k * tile.bm, tile.threads, thread, weight)
        spread(tile.k * tile.bn, tile.threads, thread, activation)

    def done(at: Any, channel: Any, pixel: Any, sums: Any) -> None:
        vector = Registers(1, LANES)
        vector[0] = sums
        row = at[0] * tile.bn + pixel
        for lane in range(LANES):
            column = at[1] * tile.bm + channel + lane
            with when(tirx.all(row < op.m, column < op.n)):
                place = (at[2] * op.m + row) * op.n + column
                value = scaled(op.weights, weights, column, vector.lane(0, lane), 1)
                value = value if bias is None else value + bias[column]
                operands = [
                    r[place if kind == "full" else column]
                    for r, kind in zip(residuals, op.residuals, strict=True)
                ]
                store(y, place, apply(op.epilogue, value, 1, operands), 1)

    blocks = (-(-op.m // tile.bn), -(-op.n // tile.bm), op.batch)
    product(tile, blocks, -(-op.k // tile.k), fill, done)


TEMPLATE = KernelTemplate(
    name="matmul",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
)
