"""Row-major matrix products in pairs of halves, neighbours of the depth; see ``pairs``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels.builder import load, store
from edgepipe.kernels.cuda import matmul, pair_conv, pairs, tile
from edgepipe.kernels.cuda.matmul import Operands
from edgepipe.kernels.cuda.pairs import PAIR, WORDS
from edgepipe.kernels.cuda.threads import LANES
from edgepipe.kernels.cuda.tile import Tile, spread
from edgepipe.kernels.cuda.weights import packed
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, MatmulOp) or op.a_dtype != "float16" or not pairs.faster(target):
        return ""
    if not op.constant:
        return None if op.b_dtype == "float16" else "its right operand is not in halves"
    return None if pairs.readable(op.weights) else f"weights {op.weights}"


def default(op: MatmulOp, target: Target) -> Knobs:
    return {**matmul.default(op, target), "k": pair_conv.DEPTH}


def knobs(op: MatmulOp, target: Target) -> list[Knobs]:
    return tile.settings(default(op, target))


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` → tiles ``[tile][step][k/2][bm][2]``, scales where there are codes, bias."""
    if not op.constant:
        return list(arrays)
    weight, *vectors = arrays
    shape = Tile.of(knobs)
    return [
        packed(op.weights, pair_conv.paired(matmul.tiles(weight, shape), shape)),
        *(np.ascontiguousarray(v, np.float32) for v in pairs.scales(op.weights, vectors)),
    ]


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    return matmul.emitted(op, Tile.of(knobs), _fill, pair_conv.product, "pair_")


def _fill(operands: Operands, a: Any, b: Any, left: Any, right: Any, thread: Any) -> None:
    """Both as words of pairs, ``[k/2][bm]`` and ``[k/2][bn]``."""
    op, tile = operands.op, operands.tile

    def weights(i: Any) -> None:
        store(left, i * WORDS, pairs.words(b, operands.packed + i * LANES), WORDS)

    def computed(i: Any) -> None:
        k, column = i // tile.bm * PAIR, i % tile.bm
        halves = [operands.right(k + j, column, lambda at: load(b, at, 1)) for j in range(PAIR)]
        store(left, i, pairs.joined(*halves), 1)

    def vector(i: Any) -> None:
        row, part = i // (tile.k // LANES), i % (tile.k // LANES)
        value = operands.left(row, part * LANES, lambda at: load(a, at, LANES))
        held = pairs.unpacked(tirx.reinterpret(f"uint32x{WORDS}", value))
        for word in range(WORDS):
            store(right, (part * WORDS + word) * tile.bn + row, held[word], 1)

    def scalars(i: Any) -> None:
        row, word = i // (tile.k // PAIR), i % (tile.k // PAIR)
        halves = [operands.left(row, word * PAIR + j, lambda at: load(a, at, 1))
                  for j in range(PAIR)]  # fmt: skip
        store(right, word * tile.bn + row, pairs.joined(*halves), 1)

    if op.constant:
        spread(tile.k * tile.bm // LANES, tile.threads, thread, weights)
    else:
        spread(tile.k * tile.bm // PAIR, tile.threads, thread, computed)
    if op.k % tile.k == 0:
        spread(tile.k * tile.bn // LANES, tile.threads, thread, vector)
    else:
        spread(tile.k * tile.bn // PAIR, tile.threads, thread, scalars)


TEMPLATE = KernelTemplate(
    name="pair_matmul",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=matmul.executed,
    rank=1,
    arithmetic="float16",
    accumulator=pair_conv.ACCUMULATOR,
)
