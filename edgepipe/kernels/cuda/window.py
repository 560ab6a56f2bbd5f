"""Windows that slide over an input, as rows of a matrix product: sizes, packing, and gathering.

Pointwise, grouped and dilated convolutions are cases of it, and so is each phase of a transposed
one; nothing is ever unfolded in memory. A step of the product is ``k / 4`` channel blocks at one
tap; the border of the input buffer is its zero padding, so that no load needs a test. Weights are
packed ``[group][tile][step][k][bm]`` and converted to float32 when they enter shared memory; scales
of codes act on complete sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import load, store
from edgepipe.kernels.cuda.threads import LANES, finish, read, when
from edgepipe.kernels.cuda.tile import Tile, product, spread
from edgepipe.kernels.cuda.weights import scaled
from edgepipe.kernels.ops import ConvOp, ConvTransposeOp


@dataclass(frozen=True)
class Window:
    """One product: ``rows`` x ``columns`` outputs of each sample, from windows of ``kernel``.

    Output (r, c) reads inputs from (r, c) · strides − offset on, ``dilations`` apart, and is stored
    at (r, c) · spacing + phase. ``first`` is where its packed weights begin.
    """

    op: ConvOp | ConvTransposeOp
    tile: Tile
    kernel: tuple[int, int]
    rows: int
    columns: int
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    groups: int = 1
    spacing: tuple[int, int] = (1, 1)
    phase: tuple[int, int] = (0, 0)
    first: int = 0

    @property
    def channels(self) -> int:
        """Output channels of a group, in whole vectors."""
        return self.op.y.blocks * LANES // self.groups

    @property
    def tiles(self) -> int:
        """Tiles of channels of a group."""
        return -(-self.channels // self.tile.bm)

    @property
    def pixels(self) -> int:
        return self.op.y.n * self.rows * self.columns

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def inputs(self) -> int:
        """Input channels of a group."""
        return self.op.x.c // self.groups

    @property
    def scalar(self) -> bool:
        """An image with few channels: one row of the product per channel and tap."""
        return self.op.x.lanes == 1

    @property
    def blocks(self) -> int:
        """Channel blocks of a group's input."""
        return -(-self.inputs // self.op.x.lanes)

    @property
    def per_step(self) -> int:
        """Channel blocks of a step."""
        return self.tile.k // LANES

    @property
    def steps(self) -> int:
        if self.scalar:
            return -(-self.inputs * self.taps // self.tile.k)
        return -(-self.blocks // self.per_step) * self.taps

    @property
    def elements(self) -> int:
        """Packed weights."""
        return self.groups * self.tiles * self.steps * self.tile.k * self.tile.bm

    @property
    def executed(self) -> int:
        """Multiply-accumulates of whole tiles."""
        pixels = -(-self.pixels // self.tile.bn) * self.tile.bn
        channels = self.groups * self.tiles * self.tile.bm
        return pixels * channels * self.steps * self.tile.k

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """``w[co, ci / groups, taps]`` → ``[group][tile][step][k][bm]``, flat."""
        co, ci = weight.shape[:2]
        grown = np.zeros((self.channels * self.groups, ci, self.taps), weight.dtype)
        grown[:co] = weight.reshape(co, ci, self.taps)
        groups = grown.reshape(self.groups, self.channels, ci, self.taps)
        if self.scalar:
            matrix = groups.reshape(self.groups, self.channels, -1)
        else:
            count, k = -(-self.blocks // self.per_step), self.tile.k
            channels = np.zeros((self.groups, self.channels, count * k, self.taps), weight.dtype)
            channels[:, :, :ci] = groups
            cut = channels.reshape(self.groups, self.channels, count, k, self.taps)
            matrix = cut.transpose(0, 1, 2, 4, 3).reshape(self.groups, self.channels, -1)
        depth, bm = self.steps * self.tile.k, self.tile.bm
        whole = np.zeros((self.groups, self.tiles * bm, depth), weight.dtype)
        whole[:, : self.channels, : matrix.shape[2]] = matrix
        return whole.reshape(self.groups, self.tiles, bm, depth).transpose(0, 1, 3, 2).reshape(-1)

    def _place(self, index: Any) -> tuple[Any, Any, Any]:
        """Sample, row and column of pixel ``index`` of all samples."""
        inside = index % (self.rows * self.columns)
        n = 0 if self.op.y.n == 1 else index // (self.rows * self.columns)
        return n, inside // self.columns, inside % self.columns

    def stored(self, index: Any) -> tuple[Any, Any, Any]:
        """Where the output of pixel ``index`` lies: sample, row, column."""
        n, row, column = self._place(index)
        (sy, sx), (py, px) = self.spacing, self.phase
        return n, row * sy + py, column * sx + px

    def corner(self, at: Any, pixel: Any) -> tuple[Any, Any, Any]:
        """Sample, and top left input coordinate of the window of a pixel of the tile.

        Pixels past the last repeat it: their sums are dropped.
        """
        index = at[0] * self.tile.bn + pixel
        if self.pixels % self.tile.bn:
            index = tirx.min(index, self.pixels - 1)
        n, row, column = self._place(index)
        return n, row * self.strides[0] - self.offset[0], column * self.strides[1] - self.offset[1]


@dataclass(frozen=True)
class Operands:
    """How a product takes its operands and multiplies them.

    ``weights(window, buffer, first, left, thread)`` and ``inputs(window, source, at, step, right,
    thread)`` bring a step of each to shared memory; ``product`` is called as ``tile.product``.
    """

    weights: Callable[..., None]
    inputs: Callable[..., None]
    product: Callable[..., None]


def emit(
    window: Window, buffers: Sequence[Any], after: Any, operands: Operands | None = None
) -> None:
    """One launch: the product, bias, epilogue and store. ``after`` as in ``tile.product``.

    Without ``operands`` they become float32 in shared memory.
    """
    op, tile = window.op, window.tile
    source, *rest = buffers
    weights, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
    bias, *residuals, target = rest
    how = operands or Operands(_floats, _scalars if window.scalar else _vectors, product)

    def fill(at: Any, step: Any, left: Any, right: Any, thread: Any) -> None:
        number = (at[2] * window.tiles + at[1]) * window.steps + step
        how.weights(window, weights[0], window.first + number * (tile.k * tile.bm), left, thread)
        how.inputs(window, source, at, step, right, thread)

    def done(at: Any, channel: Any, pixel: Any, sums: Any) -> None:
        inner, index = at[1] * tile.bm + channel, at[0] * tile.bn + pixel
        exact = window.channels % tile.bm == 0 and window.pixels % tile.bn == 0
        inside = tirx.all(inner < window.channels, index < window.pixels)
        with when(True if exact else inside):
            block = at[2] * (window.channels // LANES) + inner // LANES
            n, row, column = window.stored(index)
            value = scaled(op.weights, weights, block * LANES, sums)
            value = value + load(bias, block * LANES, LANES)
            finish(op, residuals, target, (n, block, row, column), value)

    blocks = (-(-window.pixels // tile.bn), window.tiles, window.groups)
    how.product(tile, blocks, window.steps, fill, done, after)


def _floats(window: Window, buffer: Any, first: Any, left: Any, thread: Any) -> None:
    """``k`` rows of weights as float32."""
    tile = window.tile

    def visit(i: Any) -> None:
        store(left, i * LANES, read(buffer, first + i * LANES, LANES), LANES)

    spread(tile.k * tile.bm // LANES, tile.threads, thread, visit)


def _vectors(window: Window, source: Any, at: Any, step: Any, right: Any, thread: Any) -> None:
    """``k / 4`` channel blocks of every pixel at one tap; four lanes go to four rows."""
    tile = window.tile

    def visit(i: Any) -> None:
        pixel, part = i % tile.bn, i // tile.bn
        moved = T.alloc_buffer((LANES,), "float32", scope="local")
        store(moved, 0, read(source, vector_offset(window, at, step, pixel, part), LANES), LANES)
        for lane in range(LANES):
            store(right, (part * LANES + lane) * tile.bn + pixel, moved[lane], 1)

    spread(window.per_step * tile.bn, tile.threads, thread, visit)


def vector_offset(window: Window, at: Any, step: Any, pixel: Any, part: Any) -> Any:
    """Where channel block ``part`` of a step lies, for a pixel of the tile."""
    taps, per_step = window.taps, window.per_step
    (_, kw), (dy, dx) = window.kernel, window.dilations
    tap = step % taps if taps > 1 else 0
    block = (step // taps if taps > 1 else step) * per_step + part
    n, row, column = window.corner(at, pixel)
    if window.blocks % per_step:
        block = tirx.min(block, window.blocks - 1)  # its weights are zero
    if window.groups > 1:
        block = block + at[2] * window.blocks
    ky, kx = (tap // kw, tap % kw) if taps > 1 else (0, 0)
    return window.op.x.offset(n, block, row + ky * dy, column + kx * dx)


def _scalars(window: Window, source: Any, at: Any, step: Any, right: Any, thread: Any) -> None:
    """Rows of an image with few channels: channel, tap row, tap column of every k."""
    tile = window.tile

    def visit(i: Any) -> None:
        place = scalar_offset(window, at, step, i % tile.bn, i // tile.bn)
        store(right, i, read(source, place, 1), 1)

    spread(tile.k * tile.bn, tile.threads, thread, visit)


def scalar_offset(window: Window, at: Any, step: Any, pixel: Any, part: Any) -> Any:
    """Where row ``part`` of a step lies, for a pixel of the tile."""
    x, tile, taps = window.op.x, window.tile, window.taps
    (_, kw), (dy, dx) = window.kernel, window.dilations
    n, row, column = window.corner(at, pixel)
    k = step * tile.k + part
    if window.inputs * taps % tile.k:
        k = tirx.min(k, window.inputs * taps - 1)  # its weights are zero
    channel, tap = k // taps, k % taps
    return x.offset(n, channel, row + tap // kw * dy, column + tap % kw * dx)
