"""Row-major matrix products: ``m`` of the tile counts columns, ``n`` rows of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels.builder import Registers, kernel, store
from edgepipe.kernels.cuda.threads import LANES, read, when, write
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
    return executed_in(op, Tile.of(knobs))


def executed_in(op: MatmulOp, tile: Tile) -> int:
    """Multiply-accumulates of whole tiles."""
    rows, columns, depth = (-(-size // part) * part for size, part in
                            ((op.m, tile.bn), (op.n, tile.bm), (op.k, tile.k)))  # fmt: skip
    return op.batch * rows * columns * depth


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` stays as it is, in the element type of its format."""
    if not op.constant:
        return list(arrays)
    weight, *rest = arrays
    return [packed(op.weights, weight), *(np.ascontiguousarray(r, np.float32) for r in rest)]


def tiles(weight: np.ndarray, tile: Tile) -> np.ndarray:
    """``w[k, n]`` → ``[tile][step][k][bm]``, zero past the last row and column."""
    k, n = (-(-size // part) for size, part in zip(weight.shape, (tile.k, tile.bm), strict=True))
    whole = np.zeros((k * tile.k, n * tile.bm), weight.dtype)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    return whole.reshape(k, tile.k, n, tile.bm).transpose(2, 0, 1, 3)


def arguments_of(op: MatmulOp, weights: int) -> list[tuple[str, int, str]]:
    """Buffers of a product in their order; ``weights`` elements of a constant right operand."""
    inputs = [("a", (op.batch if op.a_batched else 1) * op.m * op.k, op.a_dtype)]
    if op.constant:
        inputs += arguments(op.weights, weights, op.n)
    else:
        inputs.append(("b", (op.batch if op.b_batched else 1) * op.k * op.n, op.b_dtype))
    inputs += [("bias", op.n, "float32")] if op.bias else []
    sizes = {"full": op.batch * op.m * op.n, "row": op.n}
    dtypes = op.residual_dtypes or ("float32",) * len(op.residuals)
    pairs = zip(op.residuals, dtypes, strict=True)
    inputs += [(f"r{i}", sizes[kind], dtype) for i, (kind, dtype) in enumerate(pairs)]
    return [*inputs, ("y", op.batch * op.m * op.n, op.y_dtype)]


@dataclass(frozen=True)
class Operands:
    """Elements of both operands, for the ``step`` of a block of a product in tiles like ``tile``:
    what lies outside of the matrices is 0."""

    op: MatmulOp
    tile: Tile
    at: tuple[Any, Any, Any]
    step: Any

    def _inside(self, k: Any, value: Any) -> Any:
        if self.op.k % self.tile.k == 0:
            return value
        return tirx.if_then_else(k < self.op.k, value, tirx.const(0, str(value.ty.dtype)))

    def _depth(self, k: Any) -> tuple[Any, Any]:
        """Place of ``k`` in the depth of the product, and the nearest one inside."""
        k = self.step * self.tile.k + k
        return k, tirx.min(k, self.op.k - 1) if self.op.k % self.tile.k else k

    @property
    def packed(self) -> Any:
        """Where the step begins in weights that are packed by ``tiles``."""
        steps = -(-self.op.k // self.tile.k)
        return (self.at[1] * steps + self.step) * (self.tile.k * self.tile.bm)

    def right(self, k: Any, column: Any, value: Callable[[Any], Any]) -> Any:
        """``value`` at the offset of row ``k``, ``column`` of the right operand's tile."""
        op, column = self.op, self.at[1] * self.tile.bm + column
        batch = self.at[2] if op.b_batched else 0
        safe = tirx.min(column, op.n - 1) if op.n % self.tile.bm else column
        k, inner = self._depth(k)
        return self._inside(k, value((batch * op.k + inner) * op.n + safe))

    def left(self, row: Any, k: Any, value: Callable[[Any], Any]) -> Any:
        """``value`` at the offset of ``row``, column ``k`` of the left operand's tile."""
        op, row = self.op, self.at[0] * self.tile.bn + row
        batch = self.at[2] if op.a_batched else 0
        safe = tirx.min(row, op.m - 1) if op.m % self.tile.bn else row
        k, inner = self._depth(k)
        return self._inside(k, value((batch * op.m + safe) * op.k + inner))


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    return emitted(op, Tile.of(knobs), _fill, product)


def emitted(
    op: MatmulOp, tile: Tile, fill: Callable[..., None], multiply: Callable[..., None],
    prefix: str = "",
) -> Any:  # fmt: skip
    """The kernel; its name has a ``prefix`` where weights are packed by ``tiles``.

    ``fill(operands, a, b, left, right, thread)`` brings a step of both to shared memory, that of
    weights ``left``; ``multiply`` is called as ``tile.product``.
    """
    name = prefix + ("dense" if op.constant else "matmul")

    def body(a: Any, *rest: Any) -> None:
        def step(at: Any, step: Any, left: Any, right: Any, thread: Any) -> None:
            fill(Operands(op, tile, at, step), a, rest[0], left, right, thread)

        blocks = (-(-op.m // tile.bn), -(-op.n // tile.bm), op.batch)
        multiply(tile, blocks, -(-op.k // tile.k), step, _finish(op, tile, rest))

    rows, columns = (-(-op.k // tile.k) * tile.k, -(-op.n // tile.bm) * tile.bm)
    elements = rows * columns if prefix else op.k * op.n
    return kernel(name, arguments_of(op, elements), body)


def _fill(operands: Operands, a: Any, b: Any, left: Any, right: Any, thread: Any) -> None:
    """Both as float32."""
    tile = operands.tile

    def weight(i: Any) -> None:
        at = i // tile.bm, i % tile.bm
        store(left, i, operands.right(*at, lambda offset: row_values(b, offset, 1)), 1)

    def activation(i: Any) -> None:
        row, k = i // tile.k, i % tile.k
        value = operands.left(row, k, lambda offset: read(a, offset, 1))
        store(right, k * tile.bn + row, value, 1)

    spread(tile.k * tile.bm, tile.threads, thread, weight)
    spread(tile.k * tile.bn, tile.threads, thread, activation)


def _finish(op: MatmulOp, tile: Tile, buffers: Sequence[Any]) -> Callable[..., None]:
    """What ``product`` does with sums; ``buffers`` are those behind the left operand."""
    *rest, y = buffers
    weights, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
    bias, residuals = (rest[0], rest[1:]) if op.bias else (None, rest)

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
                    read(r, place if kind == "full" else column, 1)
                    for r, kind in zip(residuals, op.residuals, strict=True)
                ]
                write(y, place, apply(op.epilogue, value, 1, operands), 1)

    return done


TEMPLATE = KernelTemplate(
    name="matmul",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
)
