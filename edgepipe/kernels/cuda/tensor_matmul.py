"""Row-major matrix products of halves on tensor cores, sums in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import load, store
from edgepipe.kernels.cuda import matmul, tensor
from edgepipe.kernels.cuda.matmul import Operands
from edgepipe.kernels.cuda.tensor import LEAST_SM, TensorTile
from edgepipe.kernels.cuda.threads import LANES
from edgepipe.kernels.cuda.tile import copied, spread
from edgepipe.kernels.cuda.weights import packed
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    assert target.cuda is not None
    if not isinstance(op, MatmulOp) or target.cuda.sm < LEAST_SM or op.a_dtype != "float16":
        return ""
    right = op.weights.kind if op.constant else op.b_dtype
    return None if right == "float16" else f"its right operand is {right}"


def default(op: MatmulOp, target: Target) -> Knobs:
    assert target.cuda is not None
    return tensor.choose(op.n, op.m, target.cuda.processors, op.batch).knobs()


def knobs(op: MatmulOp, target: Target) -> list[Knobs]:
    return [tile.knobs() for tile in tensor.CHOICES]


def executed(op: MatmulOp, knobs: Knobs) -> int:
    return matmul.executed_in(op, TensorTile.of(knobs))


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` → tiles ``[tile][step][k][bm]``, bias."""
    if not op.constant:
        return list(arrays)
    weight, *vectors = arrays
    tiles = matmul.tiles(weight, TensorTile.of(knobs)).reshape(-1)
    return [packed(op.weights, tiles), *(np.ascontiguousarray(v, np.float32) for v in vectors)]


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    return matmul.emitted(op, TensorTile.of(knobs), _fill, tensor.product, "tensor_")


def _fill(operands: Operands, a: Any, b: Any, left: Any, right: Any, thread: Any) -> None:
    """Halves as they are, ``[k][bm]`` and ``[bn][k]``."""
    op, tile = operands.op, operands.tile

    def computed(i: Any) -> None:
        value = operands.right(i // tile.bm, i % tile.bm, lambda at: load(b, at, 1))
        store(left, i, value, 1)

    lanes = LANES if op.k % tile.k == 0 else 1

    def rows(i: Any) -> None:
        row, k = i * lanes // tile.k, i * lanes % tile.k
        store(right, i * lanes, operands.left(row, k, lambda at: load(a, at, lanes)), lanes)

    if op.constant:
        copied(tile, b, operands.packed, left, thread)
    else:
        spread(tile.k * tile.bm, tile.threads, thread, computed)
    spread(tile.k * tile.bn // lanes, tile.threads, thread, rows)


TEMPLATE = KernelTemplate(
    name="tensor_matmul",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
    rank=2,
    arithmetic="float16",
)
