"""The tiled matrix product behind convolutions and dense layers.

``m`` counts output channels (columns of a matrix product), ``n`` pixels (rows). A block of threads
computes ``bm`` x ``bn`` results: both operands pass through shared memory ``k`` at a time, and each
thread keeps ``tm`` x ``tn`` sums in registers. A thread's channels are neighbours, so that they are
read and stored as vectors; its pixels are ``tx`` apart, so that threads store side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import Registers, load, loop, store
from edgepipe.kernels.cuda.threads import LANES, barrier, launch, shared, zeros


@dataclass(frozen=True)
class Tile:
    """Shape of a block's tile: per thread ``tm`` x ``tn``, threads ``ty`` x ``tx``, depth ``k``."""

    tm: int
    tn: int
    ty: int
    tx: int
    k: int

    @property
    def bm(self) -> int:
        return self.tm * self.ty

    @property
    def bn(self) -> int:
        return self.tn * self.tx

    @property
    def threads(self) -> int:
        return self.ty * self.tx

    def knobs(self) -> dict[str, int]:
        return {"tm": self.tm, "tn": self.tn, "ty": self.ty, "tx": self.tx, "k": self.k}

    @classmethod
    def of(cls, knobs: dict[str, Any]) -> Tile:
        return cls(*(knobs[name] for name in ("tm", "tn", "ty", "tx", "k")))


#: What fits every sm from 5.3 on without spills, largest first.
CHOICES = (
    Tile(8, 4, 8, 16, 16),
    Tile(8, 4, 4, 32, 16),
    Tile(4, 4, 8, 16, 16),
    Tile(4, 2, 8, 16, 16),
    Tile(4, 4, 4, 32, 16),
    Tile(4, 4, 2, 32, 16),
    Tile(4, 2, 4, 16, 16),
)


def settings(knobs: dict[str, int]) -> list[dict[str, int]]:
    """``knobs`` with every tile there is. The depth of a step stays: it orders the sums."""
    return [{**tile.knobs(), "k": knobs["k"]} for tile in CHOICES]


def choose(m: int, n: int, batch: int, processors: int) -> Tile:
    """The tile that is expected to be quickest: little padding, and blocks for every processor.

    The cost is multiply-adds done, times the loads from shared memory per multiply-add, over the
    share of processors that have work in the last wave.
    """

    def cost(tile: Tile) -> float:
        blocks = -(-m // tile.bm) * -(-n // tile.bn) * batch
        slots = processors * max(1, 512 // tile.threads)
        waves = -(-blocks // slots)
        loads = (tile.tm / 4 + tile.tn) / (tile.tm * tile.tn)
        return waves * slots * tile.bm * tile.bn * (1 + 2 * loads)

    return min(CHOICES, key=lambda t: (cost(t), CHOICES.index(t)))


def nothing(thread: Any, threads: int) -> None:
    """What follows a product that has no border to fill."""


def product(
    tile: Tile,
    blocks: tuple[int, int, int],
    steps: int,
    fill: Callable[[tuple[Any, Any, Any], Any, Any, Any, Any], None],
    finish: Callable[[tuple[Any, Any, Any], Any, Any, Any], None],
    after: Callable[[Any, int], None] = nothing,
    dtype: str = "float32",
    multiply_add: Callable[[Any, Any, Any], Any] = lambda a, b, c: c + a * b,
    settle: Callable[[Any, Any], Any] | None = None,
) -> None:
    """One launch of ``blocks`` (pixel tiles, channel tiles, batch).

    ``fill(at, step, weights, inputs, thread)`` brings ``tile.k`` rows of both operands to shared
    memory; ``finish(at, channel, pixel, sums)`` takes four channels of one pixel, both counted
    within the block's tile; ``after`` is called with the thread's number in the launch. Operands
    and sums are ``dtype``, one product is ``multiply_add(weight, input, sum)``. With ``settle`` the
    sums are those of one step: ``settle(total, sum)`` adds them to float32 totals, which ``finish``
    takes instead.
    """
    with launch(blocks, tile.threads) as (*at, thread):
        tx, ty = thread % tile.tx, thread // tile.tx
        weights, inputs = (shared(tile.k * width, dtype) for width in (tile.bm, tile.bn))
        sums = zeros(tile.tn * tile.tm // LANES, LANES, dtype)
        totals = zeros(tile.tn * tile.tm // LANES, LANES) if settle else sums
        left, right = Registers(tile.tm // LANES, LANES, dtype), Registers(tile.tn, 1, dtype)

        def accumulate(step: Any) -> None:
            fill((at[0], at[1], at[2]), step, weights, inputs, thread)
            barrier()
            with loop(tile.k) as k:
                for i in range(tile.tm // LANES):
                    left[i] = load(weights, k * tile.bm + ty * tile.tm + i * LANES, LANES)
                for j in range(tile.tn):
                    right[j] = inputs[k * tile.bn + tx + j * tile.tx]
                for j in range(tile.tn):
                    for i in range(tile.tm):
                        r = j * tile.tm + i
                        total = multiply_add(left.buffer[i], right.buffer[j], sums.buffer[r])
                        T.buffer_store(sums.buffer, total, [r])
            if settle:
                for r in range(tile.tn * tile.tm):
                    T.buffer_store(totals.buffer, settle(totals.buffer[r], sums.buffer[r]), [r])
                    T.buffer_store(sums.buffer, tirx.const(0, dtype), [r])
            barrier()

        if steps:  # a phase of a transposed convolution may have no taps
            with T.serial(0, steps) as step:
                accumulate(step)
        for j in range(tile.tn):
            for i in range(tile.tm // LANES):
                value = totals[j * (tile.tm // LANES) + i]
                finish((at[0], at[1], at[2]), ty * tile.tm + i * LANES, tx + j * tile.tx, value)
        block = (at[2] * blocks[1] + at[1]) * blocks[0] + at[0]
        total_threads = blocks[0] * blocks[1] * blocks[2] * tile.threads
        after(block * tile.threads + thread, total_threads)


def copied(tile: Tile, buffer: Any, first: Any, left: Any, thread: Any) -> None:
    """``k`` rows of packed weights from ``first`` on, as they are stored, to shared memory."""

    def visit(i: Any) -> None:
        store(left, i * LANES, load(buffer, first + i * LANES, LANES), LANES)

    spread(tile.k * tile.bm // LANES, tile.threads, thread, visit)


def spread(count: int, threads: int, thread: Any, visit: Callable[[Any], None]) -> None:
    """``visit(i)`` for ``0 .. count - 1``, shared out to the threads of a block."""
    whole, rest = divmod(count, threads)
    for turn in range(whole):
        visit(turn * threads + thread)
    if rest:
        with T.If(thread < rest), T.Then():
            visit(whole * threads + thread)
