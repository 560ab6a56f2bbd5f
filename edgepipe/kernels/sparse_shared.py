"""Convolution whose weights share their pattern among the channels of a register tile.

The dense kernel's register tile, over the stored places only: for each, its offset in the input is
read once, one scalar per pixel is broadcast, and a row of weights follows. Any kernel size, any
stride; weights ``[place][blocks * lanes]``, tile after tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import (
    Registers,
    bytes_of,
    counting,
    floats,
    fma,
    forward,
    kernel,
    load,
    minimum,
    parallel,
    pixels_from,
    splat,
    zero_border,
)
from edgepipe.kernels.conv_tile import is_flat
from edgepipe.kernels.dot import reinterpret
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.sparse import offset_dtype, pack_shared
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.weights import grown
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.sparse is None or op.sparse.form != "shared":
        return ""
    if op.groups > 1 or not op.weights.plain:
        return "grouped, or its weights are not float32"
    if op.sparse.width % op.y.lanes:
        return "tiles are not whole vectors"
    return None if op.y.blocks * op.y.lanes % op.sparse.width == 0 else "a tile is not filled"


#: Pixels of a register tile by its blocks of channels. With 16 registers of AVX2 four blocks leave
#: room for two pixels: three spill, and are twice as slow.
_PIXELS = {
    "wasm": {1: 8, 2: 4},
    "x86-16": {1: 14, 2: 14},
    "x86-8": {1: 12, 2: 6, 4: 2},
    "arm-32": {1: 14, 2: 12, 3: 8, 4: 6, 8: 3},
    "arm-16": {1: 8, 2: 4},
}

#: Pixels whose input stays in the second-level cache: 0.85 of the time of a whole 14x14x512 image.
_CHUNK = 64


def _tiles(target: Target) -> dict[int, int]:
    if target.kind == "wasm":
        return _PIXELS["wasm"]
    if target.arch in ("aarch64", "arm"):
        return _PIXELS["arm-32" if target.simd.registers == 32 else "arm-16"]
    return _PIXELS["x86-16" if target.simd.lanes_f32 == 16 else "x86-8"]


def widths(target: Target, channels: int) -> list[int]:
    """Output channels that a tile may have on ``target``, so that tiles divide the blocks."""
    lanes = target.simd.lanes_f32
    return [blocks * lanes for blocks in _tiles(target) if -(-channels // lanes) % blocks == 0]


def default(op: ConvOp, target: Target) -> Knobs:
    assert op.sparse is not None
    blocks, flat = op.sparse.width // op.y.lanes, is_flat(op)
    columns = op.y.h * op.y.w if flat else op.y.w
    most = _tiles(target).get(blocks, 2)
    # As many tiles as the widest one needs, of equal width: the last overlaps its neighbour.
    tiles = -(-columns // most)
    pixels = min(columns, -(-columns // tiles))
    return {
        "pixels": pixels,
        "blocks": blocks,
        "flat": flat,
        # Tiles of pixels that all tiles of channels go over before the next ones are begun.
        "chunk": max(1, _CHUNK // pixels) if flat and target.arch == "x86_64" else tiles,
        "fused": target.simd.fma and target.arch in ("aarch64", "arm"),
    }


def offsets(op: ConvOp, places: np.ndarray) -> np.ndarray:
    """Elements from a pixel's first tap in channel 0 of ``op.x`` to each place."""
    x: Blocked = op.x
    (_, kw), (dy, dx) = op.kernel, op.dilations
    tap, channel = np.divmod(places.astype(np.int64), x.c)
    ky, kx = np.divmod(tap, kw)
    block, lane = np.divmod(channel, x.lanes)
    pixel = (block * x.rows + ky * dy) * x.cols + kx * dx
    found: np.ndarray = pixel * x.lanes + lane
    return found


def _index_dtype(op: ConvOp) -> str:
    last = np.array([op.x.c * op.kernel[0] * op.kernel[1] - 1, op.x.c - 1])
    return offset_dtype(int(offsets(op, last).max()) + op.x.lanes)


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, kh, kw]``, ``b[co]`` → where tiles start, offsets, rows of weights, bias."""
    weight, bias = arrays
    assert op.sparse is not None
    starts, places, stored = pack_shared(np.asarray(weight, np.float32), op.sparse.width)
    channels = (len(starts) - 1) * op.sparse.width
    index = offsets(op, places).astype(_index_dtype(op))
    return [starts, index, stored, grown(np.asarray(bias, np.float32), channels)]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    assert op.sparse is not None
    width, places = op.sparse.width, max(op.sparse.places, 1)
    tiles = -(-op.y.c // width)
    inputs = [
        ("x", op.x.elements, "float32"),
        ("starts", tiles + 1, "int32"),
        ("places", places, _index_dtype(op)),
        ("w", places * width, "float32"),
        ("b", tiles * width, "float32"),
    ]
    return kernel(
        "sparse_shared", signature(op, inputs), lambda *b: _Emission(op, knobs, tiles, b).run()
    )


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: ConvOp, knobs: Knobs, tiles: int, buffers: Sequence[Any]) -> None:
        self.op, self.tiles = op, tiles
        self.pixels, self.blocks, self.flat = knobs["pixels"], knobs["blocks"], knobs["flat"]
        self.fused, self.chunk = knobs["fused"], knobs["chunk"]
        source, self.starts, places, weights, self.bias, *rest = buffers
        self.source, self.weights = bytes_of(source), bytes_of(weights)
        self.places = bytes_of(places, 2 if _index_dtype(op) == "uint16" else 4)
        *self.residuals, self.target = rest
        self.rows, self.columns = (1, op.y.h * op.y.w) if self.flat else (op.y.h, op.y.w)

    def run(self) -> None:
        strips = -(-self.columns // self.pixels)
        chunks = -(-strips // self.chunk)
        each = -(-strips // chunks)
        with (
            parallel(self.op.y.n) as n,
            parallel(chunks) as chunk,
            parallel(self.tiles) as tile,
            parallel(self.rows) as row,
            parallel(each) as c,
        ):
            start = minimum((chunk * each + c) * self.pixels, self.columns - self.pixels)
            self.register_tile(n, tile, row, start)
        zero_border(self.op.y, self.target)

    def register_tile(self, n: Any, tile: Any, row: Any, start: Any) -> None:
        lanes, width = self.op.y.lanes, self.blocks * self.op.y.lanes
        acc = Registers(self.pixels * self.blocks, lanes)
        for j in range(self.blocks):
            bias = load(self.bias, tile * width + j * lanes, lanes)
            for i in range(self.pixels):
                acc[i * self.blocks + j] = bias
        self.accumulate(acc, tile, T.bind(4 * self.pixel(n, row, start)))
        pixels = pixels_from(self.op.y, row, start, self.pixels, self.flat)
        for i, pixel in enumerate(pixels):
            for j in range(self.blocks):
                place = (n, tile * self.blocks + j, *pixel)
                finish(self.op, self.residuals, self.target, place, acc[i * self.blocks + j])

    def accumulate(self, acc: Registers, tile: Any, base: Any) -> None:
        """Multiply-add the stored places of every pixel, the first of which is at byte ``base``."""
        x, index = self.op.x, _index_dtype(self.op)
        lanes, size = self.op.y.lanes, 2 if index == "uint16" else 4
        width = 4 * self.blocks * lanes
        first = T.bind(self.starts[tile])
        places, weights = T.bind(first * size), T.bind(first * width)
        with counting(self.starts[tile + 1] - first, size, width) as (place, weight):
            stored = reinterpret(index, load(self.places, places + place, size))
            offset = forward(base + 4 * tirx.Cast("int32", stored))
            row = forward(weights + weight)
            vectors = [floats(self.weights, row + 4 * lanes * j, lanes) for j in range(self.blocks)]
            for i in range(self.pixels):
                step = 4 * x.lanes * self.op.strides[1] * i
                scalar = splat(floats(self.source, offset + step, 1), lanes)
                for j in range(self.blocks):
                    r = i * self.blocks + j
                    acc[r] = fma(scalar, vectors[j], acc[r], lanes, self.fused)

    def pixel(self, n: Any, row: Any, start: Any) -> Any:
        """Element of channel 0 under the first tap of a pixel."""
        x, (sy, sx), (top, left) = self.op.x, self.op.strides, self.op.offset
        if self.flat:
            return (n * x.blocks * x.h * x.w + start) * x.lanes
        return x.offset(n, 0, row * sy - top, start * sx - left)


TEMPLATE = KernelTemplate(
    name="sparse_shared", matches=matches, default=default, emit=emit, pack=pack, rank=3
)
