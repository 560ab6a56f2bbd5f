"""Matrix products on tensor cores: halves in shared memory, sums in float32 (sm_70 and later).

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
from edgepipe.kernels.cuda.tile import Tile, spread

#: The first compute capability with tensor cores.
LEAST_SM = 70
#: Side of the square that one instruction multiplies, and a thread's share of it.
SIDE, SHARE = 16, 8


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


def choose(m: int, n: int, processors: int) -> TensorTile:
    """Little padding, and work for every processor."""

    def cost(tile: TensorTile) -> float:
        blocks = -(-m // tile.bm) * -(-n // tile.bn)
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
    after: Callable[[Any, int], None],
) -> None:
    """As ``tile.product``; ``fill`` brings halves, weights ``[k][bm]`` and inputs ``[bn][k]``."""
    wm, wn = tile.tm // SIDE, tile.tn // SIDE
    with launch(blocks, tile.threads) as (bx, by, bz, thread):
        at, warp = (bx, by, bz), thread // WARP
        down, across = warp // tile.tx * wm, warp % tile.tx * wn
        weights, inputs = (shared(tile.k * width, "float16") for width in (tile.bm, tile.bn))
        pitch = tile.bm + LANES  # neighbouring pixels in other banks
        results = shared(tile.bn * pitch)
        sums = zeros(wm * wn * SHARE, 1).buffer
        # Written here because TVM cuts buffers down to what it sees used.
        left, right = (zeros(count * SHARE, 1, "uint32").buffer for count in (wm, wn))
        with T.serial(0, steps) as step:
            fill(at, step, weights, inputs, thread)
            barrier()
            for k in range(0, tile.k, SIDE):
                for i in range(wm):
                    place = _at(weights, k * tile.bm + (down + i) * SIDE)
                    _call("tensor_load_a", _at(left, i * SHARE), place, tile.bm)
                for j in range(wn):
                    place = _at(inputs, (across + j) * SIDE * tile.k + k)
                    _call("tensor_load_b", _at(right, j * SHARE), place, tile.k)
                for i in range(wm):
                    for j in range(wn):
                        share = _at(sums, (i * wn + j) * SHARE)
                        _call("tensor_mma", share, _at(left, i * SHARE), _at(right, j * SHARE))
            barrier()
        for i in range(wm):
            for j in range(wn):
                place = _at(results, (across + j) * SIDE * pitch + (down + i) * SIDE)
                _call("tensor_store", place, _at(sums, (i * wn + j) * SHARE), pitch)
        barrier()

        def visit(number: Any) -> None:
            pixel, channel = number % tile.bn, number // tile.bn * LANES
            finish(at, channel, pixel, load(results, pixel * pitch + channel, LANES))

        spread(tile.bn * tile.bm // LANES, tile.threads, thread, visit)
        block = (bz * blocks[1] + by) * blocks[0] + bx
        after(block * tile.threads + thread, blocks[0] * blocks[1] * blocks[2] * tile.threads)
