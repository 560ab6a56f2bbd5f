"""Convolution for WebAssembly as a product of matrices, its inputs packed a strip at a time.

V8 takes the loads of a loop body one by one, as they are in the module: what the body computes for
addresses costs as much as products do. So the inputs of some pixels (a strip) are copied into a
workspace, in the order in which the products take them, and weights are packed likewise:

    inputs [four pixels][place][4]   weights [tile][block][place][4]

One step, a *place*, is one input channel at one tap; 16 bytes of either. Everything has a constant
distance from two sums with one counter, which the loads of WebAssembly add up for nothing.
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
    kernel,
    load,
    loop,
    minimum,
    parallel,
    pixels_from,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.conv_tile import is_flat
from edgepipe.kernels.dot import reinterpret
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.strips import strip
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.weights import grown
from edgepipe.target import Target

#: The register tile: V8 keeps no more accumulators, beside the operands that it loads ahead.
_PIXELS, _BLOCKS, _LANES = 4, 2, 4
#: Bytes that a place has in packed inputs, and in the weights of a block.
_PLACE = 16
#: Output channels from which packing pays: each packed vector is read once by every tile of them.
_LEAST_CHANNELS = 32


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or target.kind != "wasm" or op.sparse is not None:
        return ""
    if op.groups > 1 or not op.weights.plain or op.y.lanes != _LANES:
        return ""
    return "" if op.y.c < _LEAST_CHANNELS or _pixels(op) < _PIXELS else None


def _pixels(op: ConvOp) -> int:
    return op.y.h * op.y.w


def _places(op: ConvOp) -> int:
    return op.kernel[0] * op.kernel[1] * op.x.blocks * op.x.lanes


def _starts(op: ConvOp) -> list[int]:
    """First channel block of every tile; the last one is moved back over its neighbour."""
    return [min(b, op.y.blocks - _BLOCKS) for b in range(0, op.y.blocks, _BLOCKS)]


def default(op: ConvOp, target: Target) -> Knobs:
    return {"strip": strip(_pixels(op), 4 * _places(op), _PIXELS)}


def settings(op: ConvOp, target: Target) -> list[Knobs]:
    """Strips for other caches."""
    sizes = [strip(_pixels(op), 4 * _places(op), _PIXELS, most=1 << n) for n in range(14, 21)]
    return [{"strip": size} for size in sorted({*sizes})]


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, kh, kw]``, ``b[co]`` → ``[tile][block][place][4]`` and a padded bias.

    Places are taps of channels from NCHW, else channels of taps.
    """
    weight, bias = arrays
    co, ci, kh, kw = weight.shape
    channels, inputs = op.y.blocks * _LANES, op.x.blocks * op.x.lanes
    spread = np.zeros((channels, inputs, kh, kw), np.float32)
    spread[:co, :ci] = weight
    if op.x.lanes > 1:
        spread = spread.transpose(0, 2, 3, 1)
    blocks = spread.reshape(op.y.blocks, _LANES, -1).transpose(0, 2, 1)
    tiles = np.stack([blocks[start : start + _BLOCKS] for start in _starts(op)])
    return [np.ascontiguousarray(tiles), grown(np.asarray(bias, np.float32), channels)]


def executed(op: ConvOp, knobs: Knobs) -> int:
    """Products, with those of overlapping strips and tiles and of channels that fill them."""
    count = _pixels(op)
    size = min(int(knobs["strip"]), count)
    pixels = -(-count // size) * -(-size // _PIXELS) * _PIXELS
    return op.y.n * pixels * len(_starts(op)) * _BLOCKS * _LANES * _places(op)


def emit(op: ConvOp, knobs: Knobs) -> Any:
    weights = len(_starts(op)) * _BLOCKS * _places(op) * _LANES
    inputs = [
        ("x", op.x.elements, "float32"),
        ("w", weights, "float32"),
        ("b", op.y.blocks * _LANES, "float32"),
    ]
    kind = "pointwise" if op.kernel == (1, 1) else "conv"
    return kernel(kind, signature(op, inputs), lambda *held: _Emission(op, knobs, held).run())


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: ConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.strip = op, min(knobs["strip"], _pixels(op))
        self.source, weights, self.bias, *self.residuals, self.target = buffers
        #: Bytes of all places of four pixels, or of a block of channels.
        self.row = _places(op) * _PLACE
        self.tiles = -(-self.strip // _PIXELS)
        self.weights = bytes_of(weights)
        self.packed = T.alloc_buffer((self.tiles * self.row,), "int8", scope="local")

    def run(self) -> None:
        pixels = _pixels(self.op)
        with parallel(self.op.y.n) as n, parallel(-(-pixels // self.strip)) as strip:
            # The last strip, and the last tile, are moved back over their neighbours.
            first = minimum(strip * self.strip, pixels - self.strip)
            with loop(self.tiles) as tile:
                self.pack_inputs(n, self.start(first, tile), tile)
            with parallel(len(_starts(self.op))) as channels, loop(self.tiles) as tile:
                self.register_tile(n, self.start(first, tile), tile, channels)
        zero_border(self.op.y, self.target)

    def start(self, first: Any, tile: Any) -> Any:
        """The first pixel of a tile."""
        return first + minimum(tile * _PIXELS, self.strip - _PIXELS)

    # -- inputs -------------------------------------------------------------------------------

    def pack_inputs(self, n: Any, start: Any, tile: Any) -> None:
        """The places of four pixels, in their order."""
        x, (kh, kw), (down, across) = self.op.x, self.op.kernel, self.op.dilations
        plane = x.rows * x.cols * x.lanes
        pixels = [T.bind(self.first_input(n, start, i)) for i in range(_PIXELS)]
        to = T.bind(tile * self.row)
        if x.lanes == 1:  # from NCHW: taps of channels
            with loop(x.c) as channel, loop(kh) as ky, loop(kw) as kx:
                at = channel * plane + ky * down * x.cols + kx * across
                place = to + ((channel * kh + ky) * kw + kx) * _PLACE
                for i, pixel in enumerate(pixels):
                    value = reinterpret("int8x4", self.source[pixel + at])
                    store(self.packed, place + 4 * i, value, 4)
            return
        with loop(kh) as ky, loop(kw) as kx, loop(x.blocks) as block:
            at = block * plane + (ky * down * x.cols + kx * across) * _LANES
            place = to + ((ky * kw + kx) * x.blocks + block) * _LANES * _PLACE
            self.transpose([load(self.source, pixel + at, _LANES) for pixel in pixels], place)

    def first_input(self, n: Any, start: Any, i: int) -> Any:
        """Where the inputs of pixel ``start + i`` begin."""
        op, x = self.op, self.op.x
        if is_flat(op):
            return (n * (x.blocks * x.h * x.w) + start + i) * x.lanes
        ((row, column),) = pixels_from(op.y, 0, start + i, 1, True)
        (down, across), (top, left) = op.strides, op.offset
        return x.offset(n, 0, row * down - top, column * across - left)

    def transpose(self, vectors: Sequence[Any], place: Any) -> None:
        """Channels of four pixels as pixels of four channels."""
        held = Registers(4, 4)
        for i, vector in enumerate(vectors):
            held[i] = vector
        for half in range(2):
            pairs = [2 * half, 4 + 2 * half, 2 * half + 1, 5 + 2 * half]
            a, b = (tirx.Shuffle([held[i], held[i + 1]], pairs) for i in (0, 2))
            for k, lanes in enumerate(([0, 1, 4, 5], [2, 3, 6, 7])):
                value = reinterpret("int8x16", tirx.Shuffle([a, b], lanes))
                store(self.packed, place + (2 * half + k) * _PLACE, value, 16)

    # -- products -----------------------------------------------------------------------------

    def register_tile(self, n: Any, start: Any, tile: Any, channels: Any) -> None:
        """Accumulate four pixels of two blocks, then apply the epilogue."""
        acc = Registers(_PIXELS * _BLOCKS, _LANES)
        block = minimum(channels * _BLOCKS, self.op.y.blocks - _BLOCKS)
        for j in range(_BLOCKS):
            bias = load(self.bias, (block + j) * _LANES, _LANES)
            for i in range(_PIXELS):
                acc[i * _BLOCKS + j] = bias
        self.accumulate(acc, T.bind(tile * self.row), T.bind(channels * (_BLOCKS * self.row)))
        for i, pixel in enumerate(pixels_from(self.op.y, 0, start, _PIXELS, True)):
            for j in range(_BLOCKS):
                place = (n, block + j, *pixel)
                finish(self.op, self.residuals, self.target, place, acc[i * _BLOCKS + j])

    def accumulate(self, acc: Registers, inputs: Any, weights: Any) -> None:
        """Sum over the places, from bytes ``inputs`` and ``weights`` on."""
        with counting(self.row // _PLACE, _PLACE) as (at,):
            scalars = [floats(self.packed, inputs + at + 4 * i, 1) for i in range(_PIXELS)]
            vectors = [
                floats(self.weights, weights + at + j * self.row, _LANES) for j in range(_BLOCKS)
            ]
            for i in range(_PIXELS):
                for j in range(_BLOCKS):
                    r = i * _BLOCKS + j
                    acc[r] = fma(splat(scalars[i], _LANES), vectors[j], acc[r], _LANES, False)


TEMPLATE = KernelTemplate(
    name="packed_conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    executed=executed,
    rank=2,
)
