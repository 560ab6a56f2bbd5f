"""Convolution of codes over the blocks of its weights that are not zero, any pattern of blocks.

A block is four neighbouring input channels of one tap and one output channel. A tile of output
pixels is written into a buffer of the kernel as ``[place][pixel][4 bytes]``, a place being four
channels of a tap, so that the lanes of a vector are pixels and a block is broadcast: every output
channel walks its own list of blocks (Elsen et al. 2019, "Fast Sparse ConvNets", arXiv 1911.09723,
with the instructions of dense integer kernels). Sums are turned back into channels of pixels, and
end as those of ``qconv``. Pixels past the last are the last one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, kernel, load, loop, minimum, parallel, splat, store
from edgepipe.kernels.builder import zero_border as write_border
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, finished, vectors
from edgepipe.kernels.requantize import put
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Input channels of a block.
BLOCK = 4
#: Bytes of a packed tile: what leaves a second-level cache room for the rest.
TILE_BYTES = 64 << 10
#: Places have 16 bits at most.
MOST_PLACES = 1 << 16


def unfit(op: QConvOp, target: Target) -> str | None:
    """Why there is no kernel for the blocks of ``op``, None where there is one."""
    if target.integer.dot == "mlal":
        return "its instructions gain nothing over the dense kernel"
    if op.groups > 1:
        return "grouped"
    if op.x.blocks > 1 or op.x.lanes % BLOCK:
        return "the channels of a tap are not a multiple of four"
    if places_of(op) > MOST_PLACES:
        return f"an output channel has more than {MOST_PLACES} blocks"
    if op.y.lanes % 4 and not one_pixel(op):
        return "output channels do not fill vectors of four"
    return None


def one_pixel(op: QConvOp) -> bool:
    """Whether ``op`` is a product of its weights with one vector (``qsparse_gemv``)."""
    return op.kernel == (1, 1) and op.y.n == op.x.h == op.x.w == op.y.h == op.y.w == 1


def matches(op: Any, target: Target) -> str | None:
    own = isinstance(op, QConvOp) and op.stored and not one_pixel(op)
    return unfit(op, target) if own else ""


def accumulators(target: Target) -> int:
    """Registers that a tile may take."""
    if target.kind == "wasm":  # V8 spills beyond
        return 8
    return 24 if target.simd.registers == 32 else 10


def default(op: QConvOp, target: Target) -> Knobs:
    chosen = dot.choose(target, op.limit, op.y.c)
    pixels, places = op.y.h * op.y.w, places_of(op)
    lanes = chosen.lanes
    while lanes > 8 and lanes >= 2 * pixels:
        lanes //= 2
    most = min(accumulators(target) // chosen.parts, TILE_BYTES // (places * lanes * BLOCK))

    def cost(vectors: int) -> int:  # a block's broadcast and loop cost as much as two vectors
        return -(-pixels // (vectors * lanes)) * (vectors * chosen.parts + 2)

    channels = op.y.lanes * op.y.blocks
    return {
        "dot": chosen.name,
        "lanes": lanes,
        "signed": chosen.signed,
        "vectors": min(range(1, max(1, most) + 1), key=lambda v: (cost(v), v)),
        "channels": next(c for c in (16, 8, 4) if channels % c == 0),
        "arch": target.arch,
    }


def places_of(op: QConvOp) -> int:
    """Blocks of a dense output channel."""
    return op.kernel[0] * op.kernel[1] * op.x.lanes // BLOCK


def blocks(weight: np.ndarray) -> int:
    """How many blocks of ``w[co, ci, kh, kw]`` are not all zero."""
    return int(rows_of(weight, -(-weight.shape[1] // BLOCK) * BLOCK).any(-1).sum())


def rows_of(weight: np.ndarray, lanes: int) -> np.ndarray:
    """``w[co, ci, kh, kw]`` → ``[co, places, 4]``."""
    co, ci, kh, kw = weight.shape
    grown = np.zeros((co, kh, kw, lanes), weight.dtype)
    grown[..., :ci] = weight.transpose(0, 2, 3, 1)
    return grown.reshape(co, -1, BLOCK)


def place_dtype(op: QConvOp) -> str:
    """The narrowest type that holds every place."""
    return "uint8" if places_of(op) <= 256 else "uint16"


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, kh, kw]`` int8, ``b[co]`` int32, ``m[co]`` float32 → blocks ``[stored][4]``,
    bias, multipliers, the places of blocks, and how many each output channel has."""
    channels = op.y.lanes * op.y.blocks
    rows = rows_of(arrays[0], op.x.lanes)
    channel, place = np.nonzero(rows.any(-1))
    counts = np.bincount(channel, minlength=channels).astype(np.uint16)
    packed = np.ascontiguousarray(rows[channel, place])
    return [packed, *vectors(op, arrays, channels), place.astype(place_dtype(op)), counts]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    channels = op.y.lanes * op.y.blocks
    weights = op.stored * BLOCK, "int8"
    held = arguments(op, weights, channels, scratch(op, knobs))
    lists = [("places", op.stored, place_dtype(op)), ("counts", channels, "uint16")]
    return kernel(
        "q_sparse", [*held[:4], *lists, *held[4:]], lambda *b: _Emission(op, knobs, b).run()
    )


def scratch(op: QConvOp, knobs: Knobs) -> tuple[int, ...]:
    """The packed tile, and the sums of some channels of all its pixels."""
    pixels = knobs["vectors"] * knobs["lanes"]
    return places_of(op) * pixels, knobs["channels"] * pixels


def variant(op: QConvOp, knobs: Knobs, name: str) -> Knobs | None:
    """Relaxed dot products: weights of either sign by themselves have seven bits."""
    return {**knobs, "dot": "relaxed"} if name == "relaxed" else None


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs = op, knobs
        self.dot = dot.named(knobs["dot"], knobs["lanes"], True)
        self.source, self.weights, self.bias, self.multipliers, self.list, self.counts, *rest = (
            buffers
        )
        *self.residuals, self.target, packed, self.sums = rest
        self.packed = T.decl_buffer((packed.shape[0] * 4,), op.x.dtype, data=packed.data)
        self.lanes, self.vectors = knobs["lanes"], knobs["vectors"]
        self.tile = self.lanes * self.vectors
        self.pixels = op.y.h * op.y.w

    def run(self) -> None:
        channels, together = self.op.y.lanes * self.op.y.blocks, self.knobs["channels"]
        with parallel(self.op.y.n) as n, parallel(-(-self.pixels // self.tile)) as tile:
            start = tile * self.tile
            self.pack_tile(n, start)
            # In a register: the list of a channel begins where that of the one before ends.
            first = Registers(1, 1, "int32")
            first[0] = tirx.const(0, "int32")
            with loop(channels // together) as group:
                with loop(together) as c:
                    self.channel(group * together + c, c, first)
                with loop(self.tile // 4) as quad:
                    self.finish(n, start, group * together, quad)
        write_border(self.op.y, self.target)

    def pixel(self, number: Any) -> tuple[Any, Any]:
        """Row and column of an output pixel, of the last one beyond it."""
        if self.pixels % self.tile:
            number = minimum(number, self.pixels - 1)
        return number // self.op.y.w, number % self.op.y.w

    # -- the input ----------------------------------------------------------------------------

    def pack_tile(self, n: Any, start: Any) -> None:
        """What the taps of a tile read, as ``[place][pixel][4]``."""
        op, x = self.op, self.op.x
        kh, kw = op.kernel
        with loop(self.tile // 4) as quad, loop(kh) as ky, loop(kw) as kx:
            at = Registers(4, 1, "int32")
            for i in range(4):
                row, column = self.pixel(start + quad * 4 + i)
                in_y = row * op.strides[0] + ky * op.dilations[0] - op.offset[0]
                in_x = column * op.strides[1] + kx * op.dilations[1] - op.offset[1]
                at[i] = _int32(x.offset(n, 0, in_y, in_x))
            first = (ky * kw + kx) * (x.lanes // BLOCK)
            with loop(x.lanes // 16) as chunk:
                self.pack_chunk(at, first + chunk * 4, quad, chunk)
            for word in range(x.lanes // 16 * 4, x.lanes // BLOCK):
                for i in range(4):
                    codes = load(self.source, at[i] + word * BLOCK, BLOCK)
                    store(self.packed, self.packed_at(first + word, quad * 4 + i), codes, BLOCK)

    def pack_chunk(self, at: Registers, place: Any, quad: Any, chunk: Any) -> None:
        """Four places of four pixels: a transposition of words."""
        words = Registers(4, 4, "int32")
        for i in range(4):
            words[i] = dot.reinterpret("int32x4", load(self.source, at[i] + chunk * 16, 16))
        for j, value in enumerate(transposed([words[i] for i in range(4)])):
            codes = dot.reinterpret(f"{self.op.x.dtype}x16", value)
            store(self.packed, self.packed_at(place + j, quad * 4), codes, 16)

    def packed_at(self, place: Any, pixel: Any) -> Any:
        return (place * self.tile + pixel) * BLOCK

    # -- sums ---------------------------------------------------------------------------------

    def channel(self, channel: Any, row: Any, first: Registers) -> None:
        """Sums of one output channel for all pixels of the tile."""
        lanes, parts = self.lanes, self.dot.parts
        signs = 2 if self.dot.name == "relaxed" else 1
        acc = Registers(self.vectors * parts * signs, lanes, "int32")
        for r in range(self.vectors * parts * signs):
            acc[r] = splat(tirx.const(0, "int32"), lanes)
        begin = first[0]
        count = tirx.Cast("int32", self.counts[channel])
        with T.serial(0, count) as b:
            self.block(acc, begin + b)
        bias = splat(self.bias[channel], lanes)
        for v in range(self.vectors):
            if signs == 2:
                total = acc[2 * v] - acc[2 * v + 1]
            else:
                total = self.dot.total([acc[v * parts + p] for p in range(parts)])
            store(self.sums, row * self.tile + v * lanes, total + bias, lanes)
        first[0] = begin + count

    def block(self, acc: Registers, number: Any) -> None:
        """One block against every pixel."""
        parts = self.dot.parts
        start = tirx.Cast("int32", self.list[number]) * (self.tile * BLOCK)
        weight = self.dot.operand(self.weights, number * BLOCK)
        if self.dot.name == "relaxed":
            zero = splat(tirx.const(0, "int8"), 16)
            signs = [tirx.max(weight, zero), tirx.max(zero - weight, zero)]
            for v in range(self.vectors):
                x = load(self.packed, start + v * 16, 16)
                for s, w in enumerate(signs):
                    acc[2 * v + s] = self.dot.accumulate(acc[2 * v + s], x, w)
            return
        count = self.dot.part_bytes
        for r in range(self.vectors * parts):
            x = load(self.packed, start + r * count, count)
            if self.dot.name == "pairs":
                x = tirx.Cast(f"int16x{count}", x)
            acc[r] = self.dot.accumulate(acc[r], x, weight)

    # -- results ------------------------------------------------------------------------------

    def finish(self, n: Any, start: Any, channel: Any, quad: Any) -> None:
        """Requantise and store four pixels of the channels whose sums are there."""
        op, count = self.op, self.knobs["channels"] // 4
        totals = Registers(4 * count, 4, "int32")
        for j in range(count):
            rows = [load(self.sums, (j * 4 + r) * self.tile + quad * 4, 4) for r in range(4)]
            for i, value in enumerate(transposed(rows)):
                totals[i * count + j] = value
        for i in range(4):
            place = (n, *self.pixel(start + quad * 4 + i))
            sums = [
                finished(
                    op, totals[i * count + j], self.multipliers, self.residuals, place,
                    channel + 4 * j, 4,
                )
                for j in range(count)
            ]  # fmt: skip
            put(self.target, op.y, place, channel, sums, op.limits, self.knobs["arch"], 4)


def transposed(rows: Sequence[Any]) -> list[Any]:
    """Columns of four int32x4."""
    a, b, c, d = rows
    low, high = ([0, 4, 1, 5], [2, 6, 3, 7])
    pairs = [tirx.Shuffle([x, y], index) for index in (low, high) for x, y in ((a, b), (c, d))]
    return [
        tirx.Shuffle(pairs[2 * half : 2 * half + 2], index)
        for half in (0, 1)
        for index in ([0, 1, 4, 5], [2, 3, 6, 7])
    ]


def _int32(value: Any) -> Any:
    return tirx.const(value, "int32") if isinstance(value, int) else tirx.Cast("int32", value)


TEMPLATE = KernelTemplate(
    name="q_sparse",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    scratch=scratch,
    variant=variant,
    rank=4,
    arithmetic="int8",
    accumulator="int32",
)
