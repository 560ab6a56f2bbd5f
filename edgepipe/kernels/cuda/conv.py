"""Convolution as an implicit matrix product: weights times patches, gathered on the way to shared
memory. Pointwise and grouped convolutions are cases of it; nothing is ever unfolded in memory.

A step of the product is ``k / 4`` channel blocks at one tap; the border of the input buffer is its
zero padding, so that no load needs a test. Weights are packed ``[group][tile][step][k][bm]`` and
converted to float32 when they enter shared memory, scales of codes act on complete sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import kernel, load, store
from edgepipe.kernels.cuda.threads import LANES, fill_border, finish, when
from edgepipe.kernels.cuda.tile import Tile, choose, product, spread
from edgepipe.kernels.cuda.weights import arguments, packed, row_values, scaled, unsupported
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp):
        return ""
    if op.y.lanes != LANES:
        return "its output is not NCHW4c"
    return unsupported(op.weights)


def default(op: ConvOp, target: Target) -> Knobs:
    pixels = op.y.n * op.y.h * op.y.w
    channels = op.y.blocks * LANES // op.groups
    assert target.cuda is not None
    return choose(channels, pixels, op.groups, target.cuda.processors).knobs()


class _Shape:
    """Sizes of the matrix product of one op, per group."""

    def __init__(self, op: ConvOp, tile: Tile) -> None:
        self.op, self.tile = op, tile
        self.channels = op.y.blocks * LANES // op.groups
        self.tiles = -(-self.channels // tile.bm)
        self.pixels = op.y.n * op.y.h * op.y.w
        self.taps = op.kernel[0] * op.kernel[1]
        self.inputs = op.x.c // op.groups
        self.scalar = op.x.lanes == 1
        # Scalars: one row per channel and tap. Vectors: k / 4 channel blocks at each tap.
        self.blocks = -(-self.inputs // op.x.lanes)
        self.per_step = tile.k // LANES
        if self.scalar:
            self.steps = -(-self.inputs * self.taps // tile.k)
        else:
            self.steps = -(-self.blocks // self.per_step) * self.taps

    @property
    def rows(self) -> int:
        return self.steps * self.tile.k


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]``, scales where there are codes, ``b[co]`` → tiles, padded vectors."""
    weight, *vectors = arrays
    tile = Tile.of(knobs)
    shape = _Shape(op, tile)
    co, ci = weight.shape[:2]
    grown = np.zeros((shape.channels * op.groups, ci, *weight.shape[2:]), weight.dtype)
    grown[:co] = weight
    groups = grown.reshape(op.groups, shape.channels, ci, shape.taps)
    if shape.scalar:
        matrix = groups.reshape(op.groups, shape.channels, -1)
    else:
        blocks = -(-shape.blocks // shape.per_step)
        channels = np.zeros((op.groups, shape.channels, blocks * tile.k, shape.taps), weight.dtype)
        channels[:, :, :ci] = groups
        cut = channels.reshape(op.groups, shape.channels, blocks, tile.k, shape.taps)
        matrix = cut.transpose(0, 1, 2, 4, 3).reshape(op.groups, shape.channels, -1)
    whole = np.zeros((op.groups, shape.tiles * tile.bm, shape.rows), weight.dtype)
    whole[:, : shape.channels, : matrix.shape[2]] = matrix
    tiles = whole.reshape(op.groups, shape.tiles, tile.bm, shape.rows).transpose(0, 1, 3, 2)
    return [packed(op.weights, tiles), *(_padded(v, op.y.blocks * LANES) for v in vectors)]


def _padded(vector: np.ndarray, size: int) -> np.ndarray:
    grown = np.zeros(size, np.float32)
    grown[: vector.size] = vector.reshape(-1)
    return grown


def emit(op: ConvOp, knobs: Knobs) -> Any:
    tile = Tile.of(knobs)
    shape = _Shape(op, tile)
    elements = op.groups * shape.tiles * shape.rows * tile.bm
    inputs = [
        ("x", op.x.elements, op.x.dtype),
        *arguments(op.weights, elements, op.y.blocks * LANES),
        ("b", op.y.blocks * LANES, "float32"),
    ]

    def body(*buffers: Any) -> None:
        source, *rest = buffers
        weights, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
        bias, *residuals, target = rest

        def fill(at: Any, step: Any, left: Any, right: Any, thread: Any) -> None:
            first = ((at[2] * shape.tiles + at[1]) * shape.steps + step) * (tile.k * tile.bm)

            def weight(i: Any) -> None:
                values = row_values(op.weights, weights[0], first + i * LANES)
                store(left, i * LANES, values, LANES)

            spread(tile.k * tile.bm // LANES, tile.threads, thread, weight)
            gather = _scalars if shape.scalar else _vectors
            gather(shape, source, at, step, right, thread)

        def done(at: Any, channel: Any, pixel: Any, sums: Any) -> None:
            inner, index = at[1] * tile.bm + channel, at[0] * tile.bn + pixel
            inside = tirx.all(inner < shape.channels, index < shape.pixels)
            exact = shape.channels % tile.bm == 0 and shape.pixels % tile.bn == 0
            with when(True if exact else inside):
                block = at[2] * (shape.channels // LANES) + inner // LANES
                value = scaled(op.weights, weights, block * LANES, sums)
                value = value + load(bias, block * LANES, LANES)
                n, row, column = _place(op.y, index)
                finish(op, residuals, target, (n, block, row, column), value)

        blocks = (-(-shape.pixels // tile.bn), shape.tiles, op.groups)
        product(
            tile, blocks, shape.steps, fill, done,
            lambda thread, threads: fill_border(op.y, target, thread, threads),
        )  # fmt: skip

    kind = "pointwise" if op.kernel == (1, 1) else "conv"
    return kernel(kind, signature(op, inputs), body)


def _place(y: Blocked, index: Any) -> tuple[Any, Any, Any]:
    """Sample, row and column of pixel ``index`` of all samples."""
    inside = index % (y.h * y.w)
    n = 0 if y.n == 1 else index // (y.h * y.w)
    return n, inside // y.w, inside % y.w


def _corner(shape: _Shape, at: Any, pixel: Any) -> tuple[Any, Any, Any]:
    """Sample, and top left input coordinate of the window of a pixel of the tile.

    Pixels past the last repeat it: their sums are dropped.
    """
    op = shape.op
    index = at[0] * shape.tile.bn + pixel
    if shape.pixels % shape.tile.bn:
        index = tirx.min(index, shape.pixels - 1)
    n, row, column = _place(op.y, index)
    return n, row * op.strides[0] - op.offset[0], column * op.strides[1] - op.offset[1]


def _vectors(shape: _Shape, source: Any, at: Any, step: Any, right: Any, thread: Any) -> None:
    """``k / 4`` channel blocks of every pixel at one tap; four lanes go to four rows."""
    op, tile = shape.op, shape.tile
    (_, kw), (dy, dx) = op.kernel, op.dilations
    tap = step % shape.taps if shape.taps > 1 else 0
    first = step // shape.taps * shape.per_step if shape.taps > 1 else step * shape.per_step

    def visit(i: Any) -> None:
        pixel, part = i % tile.bn, i // tile.bn
        n, y, x = _corner(shape, at, pixel)
        block = first + part
        if shape.blocks % shape.per_step:
            block = tirx.min(block, shape.blocks - 1)  # its weights are zero
        if op.groups > 1:
            block = block + at[2] * shape.blocks
        ky, kx = (tap // kw, tap % kw) if shape.taps > 1 else (0, 0)
        place = op.x.offset(n, block, y + ky * dy, x + kx * dx)
        moved = T.alloc_buffer((LANES,), "float32", scope="local")
        store(moved, 0, load(source, place, LANES), LANES)
        for lane in range(LANES):
            store(right, (part * LANES + lane) * tile.bn + pixel, moved[lane], 1)

    spread(shape.per_step * tile.bn, tile.threads, thread, visit)


def _scalars(shape: _Shape, source: Any, at: Any, step: Any, right: Any, thread: Any) -> None:
    """Rows of an image with few channels: channel, tap row, tap column of every k."""
    op, tile = shape.op, shape.tile
    (_, kw), (dy, dx) = op.kernel, op.dilations
    rows = shape.inputs * shape.taps

    def visit(i: Any) -> None:
        pixel, part = i % tile.bn, i // tile.bn
        n, y, x = _corner(shape, at, pixel)
        k = step * tile.k + part
        if rows % tile.k:
            k = tirx.min(k, rows - 1)  # its weights are zero
        channel, tap = k // shape.taps, k % shape.taps
        place = op.x.offset(n, channel, y + tap // kw * dy, x + tap % kw * dx)
        store(right, i, source[place], 1)

    spread(tile.k * tile.bn, tile.threads, thread, visit)


TEMPLATE = KernelTemplate(name="conv", matches=matches, default=default, emit=emit, pack=pack)
