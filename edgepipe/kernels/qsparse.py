"""Convolution of codes over the blocks of its weights that are not zero, any pattern of blocks.

A block is four neighbouring input channels of one tap and one output channel. A tile of output
pixels is written into a buffer of the kernel as ``[place][pixel][4 bytes]``, a place being four
channels of a tap, so that the lanes of a vector are pixels and a block is broadcast: every output
channel walks its own list of blocks (Elsen et al. 2019, "Fast Sparse ConvNets", arXiv 1911.09723,
with the instructions of dense integer kernels). Codes are turned back into channels of pixels; with
a residual, or an output in float32, sums are, and end as those of ``qconv``. Pixels past the last
are the last one again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import dot, relaxed
from edgepipe.kernels.builder import (
    Registers,
    index_dtype,
    kernel,
    load,
    loop,
    minimum,
    parallel,
    splat,
    store,
)
from edgepipe.kernels.builder import zero_border as write_border
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, finished, vectors
from edgepipe.kernels.requantize import emit_codes, put, scaled
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.turning import interleaved, transposed
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


def direct(op: QConvOp, pixels: int) -> bool:
    """Whether sums of tiles of ``pixels`` become codes before they are turned back."""
    return not op.residuals and op.y.dtype != "float32" and pixels >= 16


def matches(op: Any, target: Target) -> str | None:
    own = isinstance(op, QConvOp) and op.stored and not one_pixel(op)
    return unfit(op, target) if own else ""


def accumulators(target: Target) -> int:
    """Registers that a tile may take."""
    if target.kind == "wasm":  # V8 spills beyond
        return 8
    if target.simd.registers == 32:
        return 28 if target.arch == "aarch64" else 24
    return 10


def default(op: QConvOp, target: Target) -> Knobs:
    chosen = dot.choose(target, op.limit, op.y.c)
    pixels, lanes = op.y.h * op.y.w, chosen.lanes
    while lanes > 8 and lanes >= 2 * pixels:
        lanes //= 2
    channels = op.y.lanes * op.y.blocks
    vectors = _vectors(op, lanes, chosen.parts, accumulators(target) // chosen.parts)
    return {
        "dot": chosen.name,
        "lanes": lanes,
        "signed": chosen.signed,
        "vectors": vectors,
        # Relaxed dot products have one accumulator where the plain form has two; else 0.
        "relaxed": _vectors(op, lanes, 1, accumulators(target))
        if target.integer.dot == "relaxed"
        else 0,
        "channels": next(c for c in (16, 8, 4) if channels % c == 0),
        "arch": target.arch,
    }


def _vectors(op: QConvOp, lanes: int, parts: int, most: int) -> int:
    """Vectors of pixels of a tile, at ``most``."""
    pixels = op.y.h * op.y.w
    most = max(1, min(most, TILE_BYTES // (places_of(op) * lanes * BLOCK)))

    def cost(vectors: int) -> int:  # a block's broadcast and loop cost as much as two vectors
        return -(-pixels // (vectors * lanes)) * (vectors * parts + 2)

    return min(range(1, most + 1), key=lambda v: (cost(v), v))


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
    bias, multipliers, the places of blocks, how many each output channel has, and for relaxed dot
    products the excess of its sums."""
    channels = op.y.lanes * op.y.blocks
    rows = rows_of(arrays[0], op.x.lanes)
    channel, place = np.nonzero(rows.any(-1))
    counts = np.bincount(channel, minlength=channels).astype(np.uint16)
    packed = np.ascontiguousarray(rows[channel, place])
    lists = [place.astype(place_dtype(op)), counts]
    if knobs["relaxed"]:
        sums = relaxed.excess(rows.reshape(len(rows), -1), op.limit)
        lists.append(np.pad(sums, (0, channels - len(sums))))
    return [packed, *vectors(op, arrays, channels), *lists]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    channels = op.y.lanes * op.y.blocks
    weights = op.stored * BLOCK, "int8"
    held = arguments(op, weights, channels, scratch(op, knobs))
    lists = [("places", op.stored, place_dtype(op)), ("counts", channels, "uint16")]
    if knobs["relaxed"]:
        lists.append(("excess", channels, "int32"))
    return kernel(
        "q_sparse", [*held[:4], *lists, *held[4:]], lambda *b: _Emission(op, knobs, b).run()
    )


def scratch(op: QConvOp, knobs: Knobs) -> tuple[int, ...]:
    """The packed tile, the codes or sums of some channels of all its pixels, and where each pixel
    is written; in all forms."""
    pixels = max(knobs["vectors"], knobs["relaxed"]) * knobs["lanes"]
    return places_of(op) * pixels, knobs["channels"] * pixels, pixels


def variant(op: QConvOp, knobs: Knobs, name: str) -> Knobs | None:
    """Relaxed dot products."""
    if name != "relaxed" or not knobs["relaxed"]:
        return None
    return {**knobs, "dot": "relaxed", "vectors": knobs["relaxed"]}


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs = op, knobs
        self.dot = dot.named(knobs["dot"], knobs["lanes"], True)
        self.factors = relaxed.Factors(op.limit) if self.dot.name == "relaxed" else None
        self.source, self.weights, self.bias, self.multipliers, self.list, self.counts, *rest = (
            buffers
        )
        self.excess: Any = rest.pop(0) if knobs["relaxed"] else None
        *self.residuals, self.target, packed, self.sums, self.written = rest
        self.packed = T.decl_buffer((packed.shape[0] * 4,), op.x.dtype, data=packed.data)
        self.lanes, self.vectors = knobs["lanes"], knobs["vectors"]
        self.index = index_dtype(knobs["arch"])
        self.tile = self.lanes * self.vectors
        self.pixels = op.y.h * op.y.w
        self.direct = direct(op, self.tile)
        if self.direct:
            size = (self.sums.shape[0] * 4,)
            self.sums = T.decl_buffer(size, op.y.dtype, data=self.sums.data)

    def run(self) -> None:
        op = self.op
        channels, together = op.y.lanes * op.y.blocks, self.knobs["channels"]
        if self.factors:
            self.factors.ask()
        with parallel(op.y.n) as n, parallel(-(-self.pixels // self.tile)) as tile:
            start = tile * self.tile
            self.pack_tile(n, start)
            if self.direct:
                with loop(self.tile) as pixel:
                    at = op.y.offset(n, 0, *self.pixel(start + pixel))
                    store(self.written, pixel, _int32(at), 1)
            # In a register: the list of a channel begins where that of the one before ends.
            first = Registers(1, 1, self.index)
            first[0] = tirx.const(0, self.index)
            with loop(channels // together) as group:
                with loop(together) as c:
                    self.channel(group * together + c, c, first)
                self.finish(n, start, group * together)
        write_border(op.y, self.target)

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
                    self.put_codes(self.packed_at(first + word, quad * 4 + i), codes, BLOCK)

    def pack_chunk(self, at: Registers, place: Any, quad: Any, chunk: Any) -> None:
        """Four places of four pixels: a transposition of words."""
        words = Registers(4, 4, "int32")
        for i in range(4):
            words[i] = dot.reinterpret("int32x4", load(self.source, at[i] + chunk * 16, 16))
        for j, value in enumerate(transposed([words[i] for i in range(4)])):
            codes = dot.reinterpret(f"{self.op.x.dtype}x16", value)
            self.put_codes(self.packed_at(place + j, quad * 4), codes, 16)

    def put_codes(self, at: Any, codes: Any, count: int) -> None:
        """Store codes of a tile as products want them."""
        store(self.packed, at, self.factors.codes(codes, count) if self.factors else codes, count)

    def packed_at(self, place: Any, pixel: Any) -> Any:
        return (place * self.tile + pixel) * BLOCK

    # -- sums ---------------------------------------------------------------------------------

    def channel(self, channel: Any, row: Any, first: Registers) -> None:
        """Codes or sums of one output channel for all pixels of the tile."""
        lanes, parts = self.lanes, self.dot.parts
        count = self.vectors * parts
        acc = Registers(count, lanes, "int32")
        bias = self.bias[channel]
        if self.factors:
            bias = bias - self.factors.stored(self.excess[channel])
        bias = splat(bias, lanes)
        for r in range(count):
            acc[r] = bias if parts == 1 else splat(tirx.const(0, "int32"), lanes)
        begin = first[0]
        blocks = tirx.Cast(self.index, self.counts[channel])
        with T.serial(tirx.const(0, self.index), blocks) as b:
            self.block(acc, begin + b)
        totals = Registers(self.vectors, lanes, "int32")
        for v in range(self.vectors):
            total = self.dot.total([acc[v * parts + p] for p in range(parts)])
            totals[v] = total if parts == 1 else total + bias
        self.keep(channel, row * self.tile, [totals[v] for v in range(self.vectors)])
        first[0] = begin + blocks

    def block(self, acc: Registers, number: Any) -> None:
        """One block against every pixel."""
        start = tirx.Cast(self.index, self.list[number]) * (self.tile * BLOCK)
        weight = self.dot.operand(self.weights, number * BLOCK)
        made = self.factors.weights(weight) if self.factors else []
        count = self.dot.part_bytes
        for r in range(self.vectors * self.dot.parts):
            x = load(self.packed, start + r * count, count)
            if self.dot.name == "pairs":
                x = tirx.Cast(f"int16x{count}", x)
            if self.factors:
                acc[r] = self.factors.accumulate(acc[r], x, made)
            else:
                acc[r] = self.dot.accumulate(acc[r], x, weight)

    # -- results ------------------------------------------------------------------------------

    def keep(self, channel: Any, at: Any, totals: Sequence[Any]) -> None:
        """Store what ``totals`` of one channel come to until those of the others are there."""
        op, lanes = self.op, self.lanes
        if not self.direct:
            for v, total in enumerate(totals):
                store(self.sums, at + v * lanes, total, lanes)
            return
        multiplier = splat(self.multipliers[channel], lanes)
        sums = [scaled(total, multiplier, lanes, False) for total in totals]
        while sums:
            count = min(16 // lanes, 1 << len(sums).bit_length() - 1)
            part, sums = sums[:count], sums[count:]
            codes = emit_codes(part, op.y, op.limits, self.knobs["arch"], lanes)
            store(self.sums, at, codes, count * lanes)
            at = at + count * lanes

    def finish(self, n: Any, start: Any, channel: Any) -> None:
        """Store the pixels of the channels whose codes or sums are there."""
        if self.direct:
            with loop(-(-self.tile // 16)) as chunk:
                self.turn(channel, minimum(chunk * 16, self.tile - 16))
        else:
            with loop(self.tile // 4) as quad:
                self.end(n, start, channel, quad)

    def turn(self, channel: Any, first: Any) -> None:
        """Store the codes of 16 pixels from ``first`` of the tile on."""
        count, y = self.knobs["channels"], self.op.y
        rows = [load(self.sums, c * self.tile + first, 16) for c in range(count)]
        for j, row in enumerate(interleaved(rows)):
            for k in range(16 // count):
                at = self.written[first + j * (16 // count) + k] + channel
                word = tirx.Shuffle([row], [k]) if count < 16 else row
                store(self.target, at, dot.reinterpret(f"{y.dtype}x{count}", word), count)

    def end(self, n: Any, start: Any, channel: Any, quad: Any) -> None:
        """Requantise and store four pixels."""
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
