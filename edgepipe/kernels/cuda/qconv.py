"""Convolution and dense layers of codes: a tiled product of words, four bytes in each.

The depth of the product counts words: four channels of a tap where pixels have whole words, else
four consecutive (tap, channel) of a window, gathered byte by byte. Weights are packed
``[group][tile][step][k][bm]`` words; where they end before a word does, the input's bytes meet
zeros. The zero point of the input is in the bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels.builder import Registers, kernel, store
from edgepipe.kernels.cuda.threads import LANES, fill_border, when
from edgepipe.kernels.cuda.tile import Tile, choose, copied, product, settings, spread
from edgepipe.kernels.cuda.words import LEAST_SM, addends, dot4, joined, put, scaled, width, word
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, vectors
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def unfit(op: QConvOp, target: Target) -> str | None:
    """Why products of codes cannot run on ``target``, or None."""
    assert target.cuda is not None
    if target.cuda.sm < LEAST_SM:
        return f"sm_{target.cuda.sm} has no dot product of bytes"
    if op.x.dtype != "int8":
        return "its input is not int8"
    return "its input is not in NHWC" if op.x.blocks > 1 else None


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or op.depthwise:
        return ""
    return unfit(op, target)


def default(op: QConvOp, target: Target) -> Knobs:
    assert target.cuda is not None
    pixels = op.y.n * op.y.h * op.y.w
    return choose(_channels(op), pixels, op.groups, target.cuda.processors).knobs()


def knobs(op: QConvOp, target: Target) -> list[Knobs]:
    return settings(default(op, target))


def _channels(op: QConvOp) -> int:
    """Output channels of a group, those past the real ones included where they are stored."""
    return op.y.lanes * op.y.blocks if op.groups == 1 else op.y.c // op.groups


class Shape:
    """Sizes of the product of one op."""

    def __init__(self, op: QConvOp, tile: Tile) -> None:
        self.op, self.tile = op, tile
        self.channels = _channels(op)
        self.tiles = -(-self.channels // tile.bm)
        self.pixels = op.y.n * op.y.h * op.y.w
        self.taps = op.kernel[0] * op.kernel[1]
        own = op.x.c // op.groups
        self.words = op.x.lanes % LANES == 0 and (op.groups == 1 or own % LANES == 0)
        #: Bytes of one tap of a group.
        self.inputs = op.x.lanes if op.groups == 1 and self.words else own
        self.depth = -(-self.inputs * self.taps // LANES)
        self.steps = -(-self.depth // tile.k)

    @property
    def executed(self) -> int:
        """Multiply-accumulates of whole tiles."""
        pixels = -(-self.pixels // self.tile.bn) * self.tile.bn
        return pixels * self.elements * LANES

    @property
    def elements(self) -> int:
        """Packed weights, in words."""
        return self.op.groups * self.tiles * self.steps * self.tile.k * self.tile.bm


def executed(op: QConvOp, knobs: Knobs) -> int:
    return Shape(op, Tile.of(knobs)).executed


def rows(shape: Shape, weight: np.ndarray) -> np.ndarray:
    """``w[co, ci/g, kh, kw]`` int8 → words ``[group, tile, bm, depth]``, zero where nothing is."""
    op, tile = shape.op, shape.tile
    co, ci = weight.shape[:2]
    grown = np.zeros((op.groups * shape.channels, shape.taps, shape.inputs), np.int8)
    grown[:co, :, :ci] = weight.reshape(co, ci, shape.taps).transpose(0, 2, 1)
    cut = grown.reshape(op.groups, shape.channels, -1)
    depth = shape.steps * tile.k
    whole = np.zeros((op.groups, shape.tiles * tile.bm, depth * LANES), np.int8)
    whole[:, : shape.channels, : cut.shape[2]] = cut
    return whole.view(np.int32).reshape(op.groups, shape.tiles, tile.bm, depth)


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]`` int8, ``b[co]`` int32, ``m[co]`` float32 → words, padded vectors."""
    words = rows(Shape(op, Tile.of(knobs)), arrays[0])
    packed = np.ascontiguousarray(words.transpose(0, 1, 3, 2)).reshape(-1)
    return [packed, *vectors(op, arrays, op.y.lanes * op.y.blocks)]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    shape = Shape(op, Tile.of(knobs))
    buffers = arguments(op, (shape.elements, "int32"), op.y.lanes * op.y.blocks)
    kind = "q_pointwise" if op.kernel == (1, 1) else "q_conv"
    return kernel(kind, buffers, lambda *held: _emit(shape, held))


def _emit(shape: Shape, buffers: Sequence[Any]) -> None:
    op, tile = shape.op, shape.tile
    source, weights = buffers[:2]

    def fill(at: Any, step: Any, left: Any, right: Any, thread: Any) -> None:
        number = (at[2] * shape.tiles + at[1]) * shape.steps + step
        first = number * (tile.k * tile.bm)

        def activation(i: Any) -> None:
            depth = step * tile.k + i // tile.bn
            if shape.depth % tile.k:
                depth = tirx.min(depth, shape.depth - 1)  # its weights are zero
            store(right, i, gathered(shape, source, at, i % tile.bn, depth), 1)

        copied(tile, weights, first, left, thread)
        spread(tile.k * tile.bn, tile.threads, thread, activation)

    product(
        tile, (-(-shape.pixels // tile.bn), shape.tiles, op.groups), shape.steps, fill,
        finisher(shape, buffers),
        lambda thread, threads: fill_border(op.y, buffers[-1], thread, threads), "int32", dot4,
    )  # fmt: skip


def finisher(shape: Shape, buffers: Sequence[Any]) -> Callable[[Any, Any, Any, Any], None]:
    """``finish`` of a product, of int32 sums of four channels of a pixel."""
    op, tile = shape.op, shape.tile
    _, _, bias, multipliers, *residuals, target = buffers

    def done(at: Any, channel: Any, pixel: Any, sums: Any) -> None:
        held = Registers(1, LANES, "int32")
        held[0] = sums
        index, lanes = at[0] * tile.bn + pixel, width(op.y, *(r.layout for r in op.residuals))
        if shape.channels % LANES:
            lanes = 1
        for part in range(0, LANES, lanes):
            inner = at[1] * tile.bm + channel + part
            with when(tirx.all(inner < shape.channels, index < shape.pixels)):
                _finish(shape, (multipliers, bias, residuals, target), index,
                        at[2] * shape.channels + inner,
                        [held.lane(0, part + i) for i in range(lanes)])  # fmt: skip

    return done


def _finish(shape: Shape, buffers: Any, index: Any, channel: Any, totals: Sequence[Any]) -> None:
    """Requantise neighbouring channels of a pixel from int32 sums, and store them."""
    multipliers, bias, residuals, target = buffers
    finish(shape.op, (multipliers, residuals, target), _place(shape, index), channel,
           [total + bias[channel + i] for i, total in enumerate(totals)])  # fmt: skip


def finish(op: QConvOp, buffers: Any, place: Any, channel: Any, totals: Sequence[Any]) -> None:
    """From complete int32 sums of neighbouring channels to what ``y`` holds."""
    multipliers, residuals, target = buffers
    values = [scaled(total, multipliers[channel + i]) for i, total in enumerate(totals)]
    for buffer, residual in zip(residuals, op.residuals, strict=True):
        added = addends(buffer, residual, place, channel, len(values))
        values = [a + b for a, b in zip(values, added, strict=True)]
    put(target, op.y, place, channel, values, op.limits)


def _place(shape: Shape, index: Any) -> tuple[Any, Any, Any]:
    y = shape.op.y
    inside = index % (y.h * y.w)
    return 0 if y.n == 1 else index // (y.h * y.w), inside // y.w, inside % y.w


def gathered(shape: Shape, source: Any, at: Any, pixel: Any, depth: Any) -> Any:
    """Word ``depth`` of the window of a pixel of the tile; pixels past the last repeat it."""
    op, index = shape.op, at[0] * shape.tile.bn + pixel
    if shape.pixels % shape.tile.bn:
        index = tirx.min(index, shape.pixels - 1)
    n, row, column = _place(shape, index)
    (_, kw), (dy, dx) = op.kernel, op.dilations
    top, left = row * op.strides[0] - op.offset[0], column * op.strides[1] - op.offset[1]

    def offset(number: Any) -> Any:
        """Of byte ``number`` of the window."""
        tap, channel = number // shape.inputs, number % shape.inputs
        where = op.x.offset(n, 0, top + tap // kw * dy, left + tap % kw * dx)
        return where + channel + (at[2] * shape.inputs if op.groups > 1 else 0)

    if shape.words:
        return word(source, offset(depth * LANES))
    last = shape.inputs * shape.taps - 1
    numbers = [tirx.min(depth * LANES + i, last) for i in range(LANES)]
    return joined([tirx.Cast("int32", source[offset(number)]) for number in numbers])


TEMPLATE = KernelTemplate(
    name="q_conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
    arithmetic="int8",
    accumulator="int32",
)
