"""Convolution as an implicit matrix product of pairs of halves; see ``window`` and ``pairs``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgepipe.kernels.builder import load, store
from edgepipe.kernels.cuda import conv, pairs, tile
from edgepipe.kernels.cuda.pairs import PAIR, WORDS
from edgepipe.kernels.cuda.threads import LANES
from edgepipe.kernels.cuda.tile import Tile, spread
from edgepipe.kernels.cuda.weights import packed
from edgepipe.kernels.cuda.window import Operands, Window, scalar_offset, vector_offset
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Channels of a step: as many products as a sum of halves takes before it is settled.
DEPTH = 32
ACCUMULATOR = "float16 up to 16 terms, float32"


def matches(op: Op, target: Target) -> str | None:
    return pairs.unfit(op, target) if isinstance(op, ConvOp) else ""


def default(op: ConvOp, target: Target) -> Knobs:
    return {**conv.default(op, target), "k": depth(op.x, op.x.c // op.groups)}


def depth(x: Blocked, channels: int) -> int:
    """The depth of a step: half of it where the channels of a tap end in its first half."""
    short = x.lanes > 1 and 0 < channels % DEPTH <= DEPTH // 2
    return DEPTH // 2 if short else DEPTH


def knobs(op: ConvOp, target: Target) -> list[Knobs]:
    return tile.settings(default(op, target))


def executed(op: ConvOp, knobs: Knobs) -> int:
    return conv.window_of(op, Tile.of(knobs)).executed


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]``, scales where there are codes, ``b[co]`` → tiles
    ``[group][tile][step][k/2][bm][2]``, padded vectors."""
    weight, *vectors = arrays
    product = conv.window_of(op, Tile.of(knobs))
    tiles = packed(op.weights, paired(product.pack(weight), product.tile))
    return [tiles, *conv.padded(op, pairs.scales(op.weights, vectors))]


def paired(tiles: np.ndarray, tile: Tile) -> np.ndarray:
    """``[…][k][bm]`` → ``[…][k/2][bm][2]``, flat."""
    return tiles.reshape(-1, PAIR, tile.bm).transpose(0, 2, 1).reshape(-1)


def emit(op: ConvOp, knobs: Knobs) -> Any:
    return conv.emitted(op, conv.window_of(op, Tile.of(knobs)), PAIRS, "pair_")


def _weights(window: Window, buffer: Any, first: Any, left: Any, thread: Any) -> None:
    """``k / 2`` rows of pairs."""
    tile = window.tile

    def visit(i: Any) -> None:
        store(left, i * WORDS, pairs.words(buffer, first + i * LANES), WORDS)

    spread(tile.k * tile.bm // LANES, tile.threads, thread, visit)


def _inputs(window: Window, source: Any, at: Any, step: Any, right: Any, thread: Any) -> None:
    """``k / 4`` channel blocks of every pixel at one tap, as two rows of pairs each."""
    tile = window.tile
    if window.scalar:
        _image(window, source, at, step, right, thread)
        return

    def visit(i: Any) -> None:
        pixel, part = i % tile.bn, i // tile.bn
        held = pairs.unpacked(pairs.words(source, vector_offset(window, at, step, pixel, part)))
        for word in range(WORDS):
            store(right, (part * WORDS + word) * tile.bn + pixel, held[word], 1)

    spread(window.per_step * tile.bn, tile.threads, thread, visit)


def _image(window: Window, source: Any, at: Any, step: Any, right: Any, thread: Any) -> None:
    """``k / 2`` pairs of the rows that ``scalar_offset`` counts."""
    tile = window.tile

    def visit(i: Any) -> None:
        pixel, word = i % tile.bn, i // tile.bn
        places = [scalar_offset(window, at, step, pixel, word * PAIR + j) for j in range(PAIR)]
        store(right, i, pairs.joined(*(load(source, place, 1) for place in places)), 1)

    spread(tile.k * tile.bn // PAIR, tile.threads, thread, visit)


def product(
    shape: Tile, blocks: tuple[int, int, int], steps: int, fill: Callable[..., None],
    finish: Callable[..., None], after: Callable[[Any, int], None] = tile.nothing,
) -> None:  # fmt: skip
    """As ``tile.product``, with words of pairs in shared memory, ``k / 2`` rows of each operand."""
    rows = replace(shape, k=shape.k // PAIR)
    tile.product(rows, blocks, steps, fill, finish, after, "uint32", pairs.fma, pairs.settle)


PAIRS = Operands(_weights, _inputs, product)

TEMPLATE = KernelTemplate(
    name="pair_conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
    rank=1,
    arithmetic="float16",
    accumulator=ACCUMULATOR,
)
