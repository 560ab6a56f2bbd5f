"""Matrix products on tensor cores: halves with sums in float32 (sm_70 and later), bytes with sums
in int32 (sm_72 and later).

A warp computes ``wm`` x ``wn`` squares of 16 x 16; four warps share a block's tile. The functions
that are called here are in ``codegen.cuda.tensor_cores``: PTX has had the instructions since 6.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import load
from edgepipe.kernels.cuda.threads import LANES, WARP, barrier, launch, shared, zeros
from edgepipe.kernels.cuda.tile import Tile, nothing, spread

#: The first compute capability with tensor cores, and with those of bytes.
LEAST_SM, LEAST_BYTES_SM = 70, 72
#: Side of the square that one instruction multiplies, and a thread's share of its results.
SIDE, SHARE = 16, 8


@dataclass(frozen=True)
class Operands:
    """What is multiplied: element type in shared memory, type of sums, prefix of the functions,
    registers of a square, squares in the depth of a tile; where a square of each operand lies, for
    the tile and the numbers of its square in depth and across, and what else its load is told."""

    element: str
    sums: str
    functions: str
    registers: int
    deep: Callable[[Tile], int]
    weights: Callable[[Tile, int, Any], tuple[Any, ...]]
    inputs: Callable[[Tile, int, Any], tuple[Any, ...]]


#: Weights ``[k][bm]``, inputs ``[bn][k]``; loads are told how far rows are apart.
HALVES = Operands(
    "float16", "float32", "tensor", SHARE, lambda tile: tile.k // SIDE,
    lambda tile, k, row: (k * SIDE * tile.bm + row * SIDE, tile.bm),
    lambda tile, k, column: (column * SIDE * tile.k + k * SIDE, tile.k),
)  # fmt: skip
#: Words of four bytes, both ``[k / 4][bm or bn][4]``, ``k`` counting words: sixteen bytes of a row
#: side by side, so that every square is aligned as loads want it.
BYTES = Operands(
    "int32", "int32", "bytes", 2, lambda tile: tile.k // LANES,
    lambda tile, k, row: ((k * tile.bm + row * SIDE) * LANES,),
    lambda tile, k, column: ((k * tile.bn + column * SIDE) * LANES,),
)  # fmt: skip


@dataclass(frozen=True)
class TensorTile(Tile):
    """``ty`` x ``tx`` warps of ``tm`` x ``tn`` results, ``k`` deep."""

    @property
    def threads(self) -> int:
        return self.ty * self.tx * WARP


#: Largest first.
CHOICES = (
    TensorTile(32, 32, 2, 2, 32),
    TensorTile(16, 32, 2, 2, 32),
    TensorTile(16, 16, 2, 2, 32),
)


def choose(m: int, n: int, processors: int, batch: int = 1) -> TensorTile:
    """Little padding, and work for every processor."""

    def cost(tile: TensorTile) -> float:
        blocks = -(-m // tile.bm) * -(-n // tile.bn) * batch
        waves = -(-blocks // (4 * processors))
        return waves * tile.bm * tile.bn * (1 + 16 / tile.tm + 16 / tile.tn)

    return min(CHOICES, key=lambda t: (cost(t), CHOICES.index(t)))


def _call(name: str, *arguments: Any) -> None:
    T.evaluate(tirx.call_extern("void", name, *arguments))


def _at(buffer: Any, index: Any) -> Any:
    return T.address_of(buffer[index])


def product(
    tile: Tile,
    blocks: tuple[int, int, int],
    steps: int,
    fill: Callable[[tuple[Any, Any, Any], Any, Any, Any, Any], None],
    finish: Callable[[tuple[Any, Any, Any], Any, Any, Any], None],
    after: Callable[[Any, int], None] = nothing,
    operands: Operands = HALVES,
) -> None:
    """As ``tile.product``; ``fill`` brings what ``operands`` says."""
    wm, wn = tile.tm // SIDE, tile.tn // SIDE
    with launch(blocks, tile.threads) as (bx, by, bz, thread):
        at, warp = (bx, by, bz), thread // WARP
        down, across = warp // tile.tx * wm, warp % tile.tx * wn
        weights, inputs = (shared(tile.k * width, operands.element) for width in (tile.bm, tile.bn))
        pitch = tile.bm + LANES  # neighbouring pixels in other banks
        results = shared(tile.bn * pitch, operands.sums)
        sums = zeros(wm * wn * SHARE, 1, operands.sums).buffer
        name, size = operands.functions, operands.registers
        # Written here because TVM cuts buffers down to what it sees used.
        left, right = (zeros(count * size, 1, "uint32").buffer for count in (wm, wn))
        with T.serial(0, steps) as step:
            fill(at, step, weights, inputs, thread)
            barrier()
            for k in range(operands.deep(tile)):
                for i in range(wm):
                    place, *rest = operands.weights(tile, k, down + i)
                    _call(f"{name}_load_a", _at(left, i * size), _at(weights, place), *rest)
                for j in range(wn):
                    place, *rest = operands.inputs(tile, k, across + j)
                    _call(f"{name}_load_b", _at(right, j * size), _at(inputs, place), *rest)
                for i in range(wm):
                    for j in range(wn):
                        share = _at(sums, (i * wn + j) * SHARE)
                        _call(f"{name}_mma", share, _at(left, i * size), _at(right, j * size))
            barrier()
        for i in range(wm):
            for j in range(wn):
                place = _at(results, (across + j) * SIDE * pitch + (down + i) * SIDE)
                _call(f"{name}_store", place, _at(sums, (i * wn + j) * SHARE), pitch)
        barrier()

        def visit(number: Any) -> None:
            pixel, channel = number % tile.bn, number // tile.bn * LANES
            finish(at, channel, pixel, load(results, pixel * pitch + channel, LANES))

        spread(tile.bn * tile.bm // LANES, tile.threads, thread, visit)
        block = (bz * blocks[1] + by) * blocks[0] + bx
        after(block * tile.threads + thread, blocks[0] * blocks[1] * blocks[2] * tile.threads)
