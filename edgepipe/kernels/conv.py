"""Direct convolution over blocked layouts, pointwise included.

A register tile of ``pixels`` x ``blocks * lanes`` output channels accumulates over input
channels and taps. Weights are packed ``[tile][ci block][kh][kw][ci lane][blocks * lanes]``, so the
inner loop streams them; the input needs no im2col because its border is already in the buffer.
Weights with a scale per group are packed ``[tile][kh][kw][ci][blocks * lanes]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from edgepipe.kernels import builder
from edgepipe.kernels.builder import (
    Registers,
    fma,
    hidden,
    kernel,
    load,
    loop,
    minimum,
    neighbours,
    operand_offset,
    parallel,
    pixels_from,
    splat,
    zero_border,
)
from edgepipe.kernels.conv_tile import default, settings
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.unpack import TileWeights
from edgepipe.kernels.weights import grouped, grown, store
from edgepipe.target import Target

#: Taps of an image's kernel that are unrolled: a loop of one scalar each has no body.
_UNROLLED_TAPS = 9


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.sparse is not None:
        return ""
    lanes = op.y.lanes
    if op.groups > 1:
        if op.x.lanes != lanes:
            return "grouped convolution needs a blocked input"
        if (op.x.c // op.groups) % lanes or (op.y.c // op.groups) % lanes:
            return f"channels per group are not a multiple of {lanes}"
    return None


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]``, ``b[co]`` → packed weights and a bias padded to whole blocks.

    Codes come with their scales between the two: ``s[co]``, or ``s[co, groups, kh, kw]``.
    """
    weight, *scale, bias = arrays
    co, ci, kh, kw = weight.shape
    lanes, x_lanes, width = op.y.lanes, op.x.lanes, knobs["blocks"] * op.y.lanes
    channels, ci_blocks = op.y.blocks * lanes, -(-ci // x_lanes)
    padded_bias = grown(np.asarray(bias, np.float32), channels)
    if op.weights.group:
        codes, scales = (
            grown(a.transpose(2, 3, 1, 0).reshape(kh * kw, -1, co), channels)
            for a in (weight, scale[0])
        )
        starts = range(0, channels, width)
        rows, factors = grouped(op.weights, codes, scales, starts, width)
        return [store(op.weights, rows), factors, padded_bias]
    spread = np.zeros((channels, ci_blocks * x_lanes, kh, kw), weight.dtype)
    spread[:co, :ci] = weight
    tiles = spread.reshape(-1, width, ci_blocks, x_lanes, kh, kw)
    order = (0, 4, 5, 2, 3, 1) if _taps_outside(op, knobs) else (0, 2, 4, 5, 3, 1)
    packed = store(op.weights, tiles.transpose(order))
    return [packed, *(grown(np.asarray(s, np.float32), channels) for s in scale), padded_bias]


def _taps_outside(op: ConvOp, knobs: Knobs) -> bool:
    """Whether weights are packed ``[tile][kh][kw][ci]``, channels innermost."""
    return bool(knobs["channel_loop"]) and op.x.lanes > 1


def emit(op: ConvOp, knobs: Knobs) -> Any:
    channels = op.y.blocks * op.y.lanes
    rows = op.y.blocks // knobs["blocks"] * _rows(op)
    inputs = [
        ("x", op.x.elements, "float32"),
        *op.weights.arguments(rows, knobs["blocks"] * op.y.lanes, channels * _groups(op)),
        ("b", channels, "float32"),
    ]
    kind = "pointwise" if op.kernel == (1, 1) else "conv"
    return kernel(kind, signature(op, inputs), lambda *buffers: _Emission(op, knobs, buffers).run())


def _rows(op: ConvOp) -> int:
    """Weight rows of a tile: taps times input channels, these in whole blocks except in groups."""
    channels = op.x.c // op.groups
    if not op.weights.group:
        channels = -(-channels // op.x.lanes) * op.x.lanes
    return channels * op.kernel[0] * op.kernel[1]


def _groups(op: ConvOp) -> int:
    """Scales per output channel."""
    if not op.weights.group:
        return 1
    return op.weights.groups(op.x.c // op.groups) * op.kernel[0] * op.kernel[1]


class _Emission:
    """One kernel being emitted: the loops around a register tile, and the tile itself."""

    def __init__(self, op: ConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs = op, knobs
        self.pixels, self.blocks, self.flat = knobs["pixels"], knobs["blocks"], knobs["flat"]
        self.source, *rest = buffers
        packed, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
        shape = (self.blocks, op.y.lanes)
        self.weights = TileWeights(op.weights, packed, shape, knobs["half"], knobs["fused"])
        self.bias, *self.residuals, self.target = rest
        self.ci_blocks = -(-(op.x.c // op.groups) // op.x.lanes)
        self.tiles = op.y.blocks // self.blocks
        # Without padding a pointwise kernel walks all pixels of the image as one row.
        self.rows, self.columns = (1, op.y.h * op.y.w) if self.flat else (op.y.h, op.y.w)

    def run(self) -> None:
        full, rest = divmod(self.columns, self.pixels)
        if rest and not self.knobs.get("rest"):
            full, rest = full + 1, 0
        last = self.columns - rest
        with parallel(self.op.y.n) as n:
            if self.knobs["outer"] == "pixels":
                with parallel(self.rows) as row:
                    with parallel(full) as c, parallel(self.tiles) as tile:
                        self.register_tile(n, tile, row, self.start(c), self.pixels)
                    if rest:  # not marked: of two loops side by side none would be shared
                        with loop(self.tiles) as tile:
                            self.register_tile(n, tile, row, last, rest)
            else:
                with parallel(self.tiles) as tile, parallel(self.rows) as row:
                    with parallel(full) as c:
                        self.register_tile(n, tile, row, self.start(c), self.pixels)
                    if rest:
                        self.register_tile(n, tile, row, last, rest)
        zero_border(self.op.y, self.target)

    def start(self, column_tile: Any) -> Any:
        """First pixel of a tile; the last one overlaps its neighbour: the same, stored twice."""
        if self.knobs.get("rest"):
            return column_tile * self.pixels
        return minimum(column_tile * self.pixels, self.columns - self.pixels)

    def register_tile(self, n: Any, tile: Any, row: Any, start: Any, pixels: int) -> None:
        """Accumulate ``pixels`` x ``blocks`` output vectors, then apply the epilogue."""
        acc = Registers(pixels * self.blocks, self.op.y.lanes)
        for j in range(self.blocks):
            value = self.weights.start(self.bias_vector(tile, j))
            for i in range(pixels):
                acc[i * self.blocks + j] = value
        self.accumulate(acc, n, tile, row, start)
        if self.knobs.get("pairs"):
            self.put_pairs(acc, n, tile, row, start)
        else:
            self.put(acc, n, tile, row, start)

    def put(self, acc: Registers, n: Any, tile: Any, row: Any, start: Any) -> None:
        """Store a tile, all channels of a pixel and then the next pixel."""
        places = pixels_from(self.op.y, row, start, acc.count // self.blocks, self.flat)
        for i, pixel in enumerate(places):
            for j in range(self.blocks):
                place = (n, tile * self.blocks + j, *pixel)
                value = self.finished(acc[i * self.blocks + j], tile, j)
                finish(self.op, self.residuals, self.target, place, value)

    def put_pairs(self, acc: Registers, n: Any, tile: Any, row: Any, start: Any) -> None:
        """Store a tile, neighbours after one another: that takes one instruction for two."""
        y, first = self.op.y, tile * self.blocks
        pixels = acc.count // self.blocks
        operands = Registers(len(self.residuals) or 1, y.lanes)
        for j in range(self.blocks):
            for i in range(pixels):
                for k, (buffer, layout) in enumerate(
                    zip(self.residuals, self.op.residuals, strict=True)
                ):
                    at = operand_offset(layout, n, first, row, start + i)
                    if j and layout.blocks > 1:
                        at = at + hidden(j * layout.rows * layout.cols * layout.lanes)
                    operands[k] = load(buffer, at, y.lanes)
                r = i * self.blocks + j
                own = [operands[k] for k in range(len(self.residuals))]
                acc[r] = apply(self.op.epilogue, self.finished(acc[r], tile, j), y.lanes, own)
        plane, border = y.rows * y.cols * y.lanes, y.offset(0, 0, 0, 0)
        # In registers: what only one side of a branch computes would stay in the loops.
        far = Registers(self.blocks, 1, "int32")
        for j in range(self.blocks):
            far[j] = hidden(border + j * plane)

        def store_all(pixel: tuple[Any, Any], gaps: Sequence[Any]) -> None:
            base = y.offset(n, first, *pixel) - border
            for j in range(self.blocks):
                for i, gap in enumerate(gaps):
                    at = base + far[j] + (gap + i) * y.lanes
                    builder.store(self.target, at, acc[i * self.blocks + j], y.lanes)

        # Where tiles begin at even pixels no row ends between the two of a pair.
        even = y.w % 2 == self.pixels % 2 == 0
        neighbours(y, row, start, pixels, self.flat, even, store_all)

    def finished(self, value: Any, tile: Any, j: int) -> Any:
        """A complete accumulator of block ``j`` of the tile."""
        channel = (tile * self.blocks + j) * self.op.y.lanes
        return self.weights.finished(value, channel, self.bias_vector(tile, j))

    def bias_vector(self, tile: Any, j: int) -> Any:
        return load(self.bias, (tile * self.blocks + j) * self.op.y.lanes, self.op.y.lanes)

    def accumulate(self, acc: Registers, *at: Any) -> None:
        """Sum over input channels and taps, in the order in which the weights are packed."""
        (kh, kw), x_lanes = self.op.kernel, self.op.x.lanes
        taps, channels = kh * kw, self.ci_blocks * x_lanes
        if self.op.weights.group:
            self.accumulate_groups(acc, at)
        elif _taps_outside(self.op, self.knobs):
            with loop(kh) as ky, loop(kw) as kx, self.channels() as (block, lane):
                number = (ky * kw + kx) * channels + block * x_lanes + lane
                self.multiply_add(acc, at, (number, 0), self.scalar(at, (block, ky, kx), lane))
        elif self.knobs["channel_loop"]:
            with loop(channels * taps) as t:
                where = (t // taps, t % taps // kw, t % kw)
                self.multiply_add(acc, at, (t, 0), self.scalar(at, where, 0))
        elif x_lanes == 1 and self.knobs.get("by_row") and self.reach(acc) >= 4:
            with loop(self.ci_blocks) as block:
                if taps <= _UNROLLED_TAPS:
                    for ky in range(kh):
                        self.image_row(acc, at, (block, ky, 0))
                else:
                    with loop(kh) as ky:
                        self.image_row(acc, at, (block, ky, 0))
        elif x_lanes == 1 and taps <= _UNROLLED_TAPS and self.ci_blocks > 1:
            # From NCHW there is one scalar per tap: unroll the taps so that the loop has a body.
            with loop(self.ci_blocks) as block:
                for ky, kx in product(range(kh), range(kw)):
                    self.tap(acc, at, (block, ky, kx))
        else:
            unroll = self.knobs.get("unroll", 1)
            with loop(self.ci_blocks // unroll) as block, loop(kh) as ky, loop(kw) as kx:
                for u in range(unroll):
                    self.tap(acc, at, (block * unroll, ky, kx), u)

    @contextmanager
    def channels(self) -> Iterator[tuple[Any, Any]]:
        """Block and lane of one input channel after another."""
        lanes = self.op.x.lanes
        if self.knobs.get("lane_loop"):  # records from before do not name it
            with loop(self.ci_blocks) as block, loop(lanes) as lane:
                yield block, lane
        else:
            with loop(self.ci_blocks * lanes) as channel:
                yield channel // lanes, channel % lanes

    def accumulate_groups(self, acc: Registers, at: tuple[Any, ...]) -> None:
        """The same sum with a scale per tap and group, in the order taps, groups, channels."""
        (kh, kw), x_lanes, weights = self.op.kernel, self.op.x.lanes, self.op.weights
        channels = self.op.x.c // self.op.groups
        with loop(kh) as ky, loop(kw) as kx:
            tap = ky * kw + kx
            for run in weights.runs(channels):
                # As many channels at once as lie in one block wherever the group begins.
                step = 1 if self.knobs["channel_loop"] else math.gcd(run.size, x_lanes)
                with loop(run.groups) as g:
                    with loop(run.size // step) as part:
                        c = run.channel + g * run.size + part * step
                        where = (c // x_lanes, ky, kx)
                        self.lanes(acc, at, where, tap * channels + c, (c % x_lanes, step))
                    number = tap * weights.groups(channels) + run.group + g
                    self.weights.end_group(acc, at[1] * _groups(self.op) + number)

    def tap(
        self, acc: Registers, at: tuple[Any, ...], where: tuple[Any, ...], after: int = 0
    ) -> None:
        """Multiply-add all lanes of one input block at one tap, unrolled; ``after`` blocks on."""
        (kh, kw), x_lanes, (block, ky, kx) = self.op.kernel, self.op.x.lanes, where
        first = (((block + after) * kh + ky) * kw + kx) * x_lanes
        self.lanes(acc, at, where, first, (0, x_lanes), after)

    def lanes(
        self, acc: Registers, at: tuple[Any, ...], where: tuple[Any, ...], number: Any,
        span: tuple[Any, int], after: int = 0,
    ) -> None:  # fmt: skip
        """Multiply-add lanes ``span`` (first, count) of one input block, unrolled."""
        first, count = span
        if not (self.knobs["by_element"] and count == self.op.x.lanes):
            for lane in range(count):
                self.multiply_add(acc, at, (number, lane), self.scalar(at, where, first + lane))
            return
        pixels, x = acc.count // self.blocks, self.op.x
        inputs = Registers(pixels, count)
        far = hidden(after * x.rows * x.cols * x.lanes) if after else 0
        for i in range(pixels):
            inputs[i] = load(self.source, self.input_offset(at, where, i) + far, count)
        for lane in range(count):
            element = partial(inputs.lane, lane=lane)
            self.multiply_add(acc, at, (number, lane), element, in_registers=True)

    def image_row(self, acc: Registers, at: tuple[Any, ...], where: tuple[Any, ...]) -> None:
        """Multiply-add all taps of one row of an NCHW input. The scalars that the tile needs are
        loaded as vectors, the last one moved back not to read past them."""
        (kh, kw), (block, ky, _), op = self.op.kernel, where, self.op
        reach = self.reach(acc)
        starts = [min(first, reach - 4) for first in range(0, reach, 4)]
        vectors = Registers(len(starts), 4)
        first = self.input_offset(at, (block, 0, 0), 0)
        far = ky * op.dilations[0] * op.x.cols
        if isinstance(ky, int) and ky:
            far = hidden(far)
        for v, start in enumerate(starts):
            vectors[v] = load(self.source, first + far + start, 4)
        for kx in range(kw):

            def element(i: int, kx: int = kx) -> Any:
                place = i * op.strides[1] + kx * op.dilations[1]
                return vectors.lane(place // 4, place - starts[place // 4])

            number = (block * kh + ky) * kw
            self.multiply_add(acc, at, (number, kx), element, in_registers=True)

    def reach(self, acc: Registers) -> int:
        """Neighbouring scalars of an input row that the pixels of ``acc`` need."""
        op, pixels = self.op, acc.count // int(self.blocks)
        return (pixels - 1) * op.strides[1] + (op.kernel[1] - 1) * op.dilations[1] + 1

    def scalar(
        self, at: tuple[Any, ...], where: tuple[Any, ...], lane: Any
    ) -> Callable[[int], Any]:
        """What one input channel is at one tap of every pixel."""
        return lambda i: self.source[self.input_offset(at, where, i) + lane]

    def multiply_add(
        self,
        acc: Registers,
        at: tuple[Any, ...],
        number: tuple[Any, int],
        scalar: Callable[[int], Any],
        in_registers: bool = False,
    ) -> None:
        """``scalar`` of every pixel times a weight row of the tile, (first, offset)."""
        lanes, pixels = self.op.y.lanes, acc.count // self.blocks
        weights = self.weights.row(at[1] * _rows(self.op) + number[0], number[1])
        tile_places = [(i, j) for i in range(pixels) for j in range(self.blocks)]
        if in_registers:  # one weight at a time fits as well
            tile_places.sort(key=lambda place: place[1])
        for i, j in tile_places:
            r = i * self.blocks + j
            acc[r] = fma(splat(scalar(i), lanes), weights[j], acc[r], lanes, self.knobs["fused"])

    def input_offset(self, at: tuple[Any, ...], where: tuple[Any, ...], pixel: int) -> Any:
        (n, tile, row, start), (block, ky, kx) = at, where
        op, x = self.op, self.op.x
        if op.groups > 1:
            block = block + tile // (self.tiles // op.groups) * self.ci_blocks
        if self.flat:
            return ((n * x.blocks + block) * (x.h * x.w) + start + pixel) * x.lanes
        in_y = row * op.strides[0] + ky * op.dilations[0] - op.offset[0]
        in_x = (start + pixel) * op.strides[1] + kx * op.dilations[1] - op.offset[1]
        return x.offset(n, block, in_y, in_x)


TEMPLATE = KernelTemplate(
    name="conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    rank=1,
)
