"""Convolution of codes, pointwise and dense layers included.

Activations are NHWC, so the bytes of neighbouring taps of a row follow one another: a *run*. A
register tile of ``pixels`` x ``groups * lanes`` channels accumulates over runs; weights are packed
``[tile][run][step][group][lane][step bytes]`` and streamed; where a run does not fill its last
step, that step reads on, against weights of zero. The last tile of pixels, and of channels where
they do not fill it, is moved back to overlap its neighbour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels import dot
from edgepipe.kernels.builder import (
    Registers,
    kernel,
    load,
    loop,
    minimum,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.dot import Dot
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.requantize import addend, put, scaled
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or op.depthwise:
        return ""
    lanes = dot.choose(target, op.limit, op.y.c).lanes
    if op.y.lanes * op.y.blocks < lanes:
        return f"{op.y.c} output channels do not fill a vector of {lanes}"
    if op.x.blocks > 1:
        return "its input is not in NHWC"
    if op.x.lanes % 4 and not merges(op):
        return "the channels of a tap are not a multiple of four"
    if op.groups > 1 and ((op.x.c // op.groups) % 4 or (op.y.c // op.groups) % lanes):
        return f"channels per group do not fill vectors of {lanes}"
    return None


def merges(op: QConvOp) -> bool:
    """Whether the taps of a row follow one another without a gap."""
    return op.groups == 1 and op.dilations[1] == 1


#: Register tiles ``(pixels, groups of channels)`` by way of summing, the best first.
_TILES = {
    "mlal": [(4, 1)],
    "pairs": [(4, 1)],
    "sdot": [(6, 4), (8, 2), (7, 3), (14, 1)],
    "vnni": [(7, 3), (14, 2), (6, 4), (14, 1)],
    "maddubs": [(4, 3), (6, 2), (3, 4), (12, 1)],
    "relaxed": [(4, 2), (8, 1)],
}
#: The same for 16 registers.
_SMALL_TILES = {"mlal": [(2, 1)], "vnni": [(4, 3), (6, 2), (3, 4), (12, 1)]}


def tile(target: Target, name: str, pixels: int, groups: int) -> tuple[int, int]:
    """The tile that wastes least on this many pixels in a row and groups of channels."""
    choices = _TILES[name]
    if target.simd.registers < 32:
        choices = _SMALL_TILES.get(name, choices)

    def waste(choice: tuple[int, int]) -> float:
        p, g = min(choice[0], pixels), min(choice[1], groups)
        return -(-pixels // p) * p / pixels * (-(-groups // g) * g / groups)

    best = min(choices, key=lambda c: (round(waste(c), 1), choices.index(c)))
    return min(best[0], pixels), min(best[1], groups)


def default(op: QConvOp, target: Target) -> Knobs:
    chosen = dot.choose(target, op.limit, op.y.c)
    flat = (
        op.kernel == (1, 1)
        and op.strides == (1, 1)
        and not op.x.padded
        and not any(r.layout.padded for r in op.residuals)
    )
    channels = op.y.lanes * op.y.blocks // op.groups
    width = op.y.h * op.y.w if flat else op.y.w
    relaxed = target.integer.dot == "relaxed" and op.groups == 1
    relaxed = relaxed and op.limit <= target.integer.weight_limit
    way = "relaxed" if relaxed else chosen.name
    pixels, groups = tile(target, way, width, channels // chosen.lanes)
    if op.groups > 1:  # tiles of one group must not reach into the next
        groups = next(g for g in range(groups, 0, -1) if (channels // chosen.lanes) % g == 0)
    return {
        "dot": chosen.name,
        "lanes": chosen.lanes,
        "signed": chosen.signed,
        # The plain form has two accumulators where the relaxed one has one.
        "pixels": max(1, pixels // 2) if relaxed else pixels,
        "groups": groups,
        "flat": flat,
        "arch": target.arch,
        "unroll": 4 if chosen.name == "sdot" else 1 if op.bits == 8 else 2,
        # Products of int16 that may be added before they are widened.
        "deep": {8: 4, 63: 2}.get(op.limit, 1),
        "offset": dot.UNSIGNED_OFFSET[op.bits] if relaxed else 0,
    }


class Geometry:
    """Runs and tiles of one op under given knobs; what ``pack`` and ``emit`` must agree on."""

    def __init__(self, op: QConvOp, knobs: Knobs) -> None:
        self.op = op
        self.dot: Dot = dot.named(knobs["dot"], knobs["lanes"], knobs["signed"])
        kh, kw = op.kernel
        self.merged = merges(op)
        ci = op.x.lanes if op.groups == 1 else op.x.c // op.groups
        self.run_bytes = kw * ci if self.merged else ci
        self.runs = kh if self.merged else kh * kw
        self.steps = -(-self.run_bytes // self.dot.step)
        if op.bits == 4:  # two steps share their bytes
            self.steps += self.steps % 2
        self.width: int = knobs["groups"] * self.dot.lanes
        self.channels = op.y.lanes * op.y.blocks
        per_group = self.channels // op.groups
        self.tiles = op.groups * -(-per_group // self.width)
        self.ci = ci

    @property
    def tile_bytes(self) -> int:
        """Packed weights of one tile of channels."""
        return self.runs * self.steps * self.width * self.dot.step * self.op.bits // 8

    def starts(self) -> list[int]:
        """First channel of each tile."""
        return [min(t * self.width, self.channels - self.width) for t in range(self.tiles)]


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]`` int8, ``b[co]`` int32, ``m[co]`` float32 → as ``emit`` reads them.

    The bias takes the zero point of the input along.
    """
    weight, bias, multiplier = arrays
    g = Geometry(op, knobs)
    co, ci, kh, kw = weight.shape
    centred = bias.astype(np.int64) - op.x.zero * weight.sum((1, 2, 3), dtype=np.int64)
    grown = np.zeros((g.channels, g.ci, kh, kw), np.int8)
    grown[:co, :ci] = weight
    rows = grown.transpose(0, 2, 3, 1).reshape(g.channels, g.runs, g.run_bytes)
    long = np.zeros((g.channels, g.runs, g.steps * g.dot.step), np.int8)
    long[..., : g.run_bytes] = rows
    tiles = np.stack([long[s : s + g.width] for s in g.starts()])
    split = tiles.reshape(g.tiles, g.width, g.runs, g.steps, g.dot.step)
    packed = np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4)) + np.int8(knobs["offset"])
    if op.bits == 4:
        # Without sign where shifts with sign are dear.
        unsigned = knobs["arch"] not in ("aarch64", "arm") and not knobs["offset"]
        nibbles = (packed + np.int8(8 if unsigned else 0)).view(np.uint8) & 15
        packed = (nibbles[:, :, ::2] | nibbles[:, :, 1::2] << 4).view(np.int8)
    padded_bias = np.zeros(g.channels, np.int32)
    padded_bias[:co] = centred
    padded = np.zeros(g.channels, np.float32)
    padded[:co] = np.broadcast_to(multiplier, (co,))
    return [packed, padded_bias, padded]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    g = Geometry(op, knobs)
    arguments = [
        ("x", op.x.elements, op.x.dtype),
        ("w", g.tiles * g.tile_bytes, "int8"),
        ("b", g.channels, "int32"),
        ("m", g.channels, "float32"),
        *((f"r{i}", r.layout.elements, r.layout.dtype) for i, r in enumerate(op.residuals)),
        ("y", op.y.elements, op.y.dtype),
        *((f"s{i}", size, "int32") for i, size in enumerate(scratch(op, knobs))),
    ]
    kind = "q_pointwise" if op.kernel == (1, 1) else "q_conv"
    return kernel(kind, arguments, lambda *buffers: _Emission(op, knobs, g, buffers).run())


def scratch(op: QConvOp, knobs: Knobs) -> tuple[int, ...]:
    """Sums of the inputs of every output pixel, which weights with an offset ask for."""
    return (op.y.h * op.y.w,) if knobs["offset"] else ()


def variant(op: QConvOp, knobs: Knobs, name: str) -> Knobs | None:
    """Relaxed dot products where weights are stored for them."""
    if name != "relaxed" or not knobs["offset"]:
        return None
    # One accumulator where the plain form has two.
    width = op.y.h * op.y.w if knobs["flat"] else op.y.w
    return {**knobs, "dot": "relaxed", "pixels": min(2 * knobs["pixels"], width)}


class _Emission:
    """One kernel being emitted: the loops around a register tile, and the tile itself."""

    def __init__(self, op: QConvOp, knobs: Knobs, g: Geometry, buffers: Sequence[Any]) -> None:
        self.op, self.knobs, self.g, self.dot = op, knobs, g, g.dot
        self.source, self.weights, self.bias, self.multipliers, *self.rest = buffers
        self.sums = self.rest.pop() if knobs["offset"] else None
        self.target = self.rest.pop()
        self.pixels, self.groups, self.flat = knobs["pixels"], knobs["groups"], knobs["flat"]
        self.rows, self.columns = (1, op.y.h * op.y.w) if self.flat else (op.y.h, op.y.w)

    def run(self) -> None:
        tiles = -(-self.columns // self.pixels)
        with loop(self.op.y.n) as n:
            if self.dot.name == "relaxed":
                self.input_sums(n)
            with loop(self.g.tiles) as tile, loop(self.rows) as row, loop(tiles) as column_tile:
                self.register_tile(n, tile, row, column_tile)
        zero_border(self.op.y, self.target)

    def input_sums(self, n: Any) -> None:
        """What the offset of the weights adds to every pixel's sums, negated."""
        offset = splat(tirx.const(self.knobs["offset"], "int8"), 16)
        whole = self.g.steps % 4 == 0  # sixteen bytes at once, else four, the same in every lane
        kw = 1 if self.g.merged else self.op.kernel[1]
        with loop(self.rows) as row, loop(self.columns) as column:
            acc = Registers(1, 4, "int32")
            acc[0] = splat(tirx.const(0, "int32"), 4)
            at = (n, 0, row, column)
            with (
                loop(self.op.kernel[0]) as ky,
                loop(kw) as kx,
                loop(self.g.steps // 4 if whole else self.g.steps) as s,
            ):
                place = self.input_offset(at, (0, ky, kx), 0) + s * (16 if whole else 4)
                x = load(self.source, place, 16) if whole else self.dot.operand(self.source, place)
                acc[0] = self.dot.accumulate(acc[0], x, offset)
            total = acc.lane(0, 0)
            for lane in range(1, 4 if whole else 1):
                total = total + acc.lane(0, lane)
            store(self.sums, row * self.columns + column, tirx.const(0, "int32") - total, 1)

    def register_tile(self, n: Any, tile: Any, row: Any, column_tile: Any) -> None:
        """Accumulate ``pixels`` x ``groups`` vectors, then requantise and store."""
        lanes, parts, arch = self.dot.lanes, self.dot.parts, self.knobs["arch"]
        start = minimum(column_tile * self.pixels, self.columns - self.pixels)
        channel = minimum(tile * self.g.width, self.g.channels - self.g.width)
        acc = Registers(self.pixels * self.groups * parts, lanes, "int32")
        zero = splat(tirx.const(0, "int32"), lanes)
        for j in range(self.groups):
            first = load(self.bias, channel + j * lanes, lanes) if parts == 1 else zero
            for i in range(self.pixels):
                value = first
                if self.dot.name == "relaxed":
                    correction = self.sums[row * self.columns + start + i]  # type: ignore[index]
                    value = first + splat(correction, lanes)
                for p in range(parts):
                    acc[(i * self.groups + j) * parts + p] = value
        self.accumulate(acc, n, tile, row, start)
        for i in range(self.pixels):
            at = start + i
            pixel = (at // self.op.y.w, at % self.op.y.w) if self.flat else (row, at)
            sums = [self.sum(acc, i, j, channel, (n, *pixel)) for j in range(self.groups)]
            place = (n, *pixel)
            put(self.target, self.op.y, place, channel, sums, self.op.limits, arch, lanes)

    def sum(self, acc: Registers, i: int, j: int, channel: Any, place: Any) -> Any:
        """The float sum of one vector of channels of one pixel."""
        lanes, parts = self.dot.lanes, self.dot.parts
        first = (i * self.groups + j) * parts
        c = channel + j * lanes
        total = self.dot.total([acc[first + p] for p in range(parts)])
        if parts > 1:
            total = total + load(self.bias, c, lanes)
        fence = bool(self.op.residuals)
        value = scaled(total, load(self.multipliers, c, lanes), lanes, fence)
        n, row, column = place
        for buffer, residual in zip(self.rest, self.op.residuals, strict=True):
            value = value + addend(buffer, residual, (n, 0, row, column), c, lanes)
        return value

    # -- the inner loops ----------------------------------------------------------------------

    def accumulate(self, acc: Registers, *at: Any) -> None:
        """Sum over the runs, in the order in which the weights are packed."""
        kw = 1 if self.g.merged else self.op.kernel[1]
        with loop(self.op.kernel[0]) as ky, loop(kw) as kx:
            run = ky * kw + kx
            chunk = self.chunk()
            with loop(self.g.steps // chunk) as s:
                self.steps(acc, at, (run, ky, kx), s * chunk, chunk)
            if self.g.steps % chunk:
                rest = self.g.steps % chunk
                self.steps(acc, at, (run, ky, kx), self.g.steps - rest, rest)

    def chunk(self) -> int:
        """Steps that are unrolled together."""
        return int(self.knobs["deep" if self.dot.name == "mlal" else "unroll"])

    def steps(self, acc: Registers, at: Any, run: Any, step: Any, count: int) -> None:
        """``count`` steps from ``step`` on, unrolled."""
        if self.dot.name == "mlal":
            self.long_steps(acc, at, run, step, count)
            return
        words = None
        if self.dot.name == "sdot" and count == 4:  # sixteen bytes of every pixel at once
            words = Registers(self.pixels, 4, "int32")
            for i in range(self.pixels):
                data = load(self.source, self.input_offset(at, run, i) + step * 4, 16)
                words[i] = dot.reinterpret("int32x4", data)
        for u in range(count):
            operands = [
                self.dot.operand(self.source, self.input_offset(at, run, i) + (step + u) * 4)
                if words is None
                else self.dot.word(words.lane(i, u))
                for i in range(self.pixels)
            ]
            for j in range(self.groups):
                for p in range(self.dot.parts):
                    w = self.weight(at, run, step, u, j, p)
                    for i in range(self.pixels):
                        r = (i * self.groups + j) * self.dot.parts + p
                        acc[r] = self.dot.accumulate(acc[r], operands[i], w)

    def long_steps(self, acc: Registers, at: Any, run: Any, step: Any, count: int) -> None:
        """Steps of sixteen bytes, their products added in int16 before they are widened."""
        inputs = Registers(self.pixels * count, 16, "int8")
        for i in range(self.pixels):
            for u in range(count):
                place = self.input_offset(at, run, i) + (step + u) * 16
                inputs[i * count + u] = load(self.source, place, 16)
        for j in range(self.groups):
            for p in range(4):
                for i in range(self.pixels):
                    pairs = []
                    for u in range(count):
                        w = self.weight(at, run, step, u, j, p)
                        pairs.append((inputs[i * count + u], w))
                    r = (i * self.groups + j) * 4 + p
                    acc[r] = dot.multiply_long(self.knobs["arch"], pairs, acc[r])

    def weight(self, at: Any, run: Any, step: Any, u: int, j: int, part: int) -> Any:
        """Weights of one part of step ``step + u``; with 4 bits ``step`` is even."""
        bits, count = self.op.bits, self.dot.part_bytes
        steps = self.g.steps * bits // 8
        local = step + u if bits == 8 else (step * bits // 8) + u // 2
        if bits == 4 and not isinstance(step, int):
            local = tirx.floordiv(step, 2) + u // 2
        number = ((at[1] * self.g.runs + run[0]) * steps + local) * self.groups + j
        codes = load(self.weights, (number * self.dot.parts + part) * count, count)
        if bits == 4:
            codes = dot.nibble(codes, count, u % 2, self.knobs["arch"], self.knobs["offset"])
        return self.dot.weight(codes, self.knobs["offset"])

    def input_offset(self, at: Any, run: Any, pixel: int) -> Any:
        (n, tile, row, start), (_, ky, kx) = at, run
        op, x = self.op, self.op.x
        first: Any = 0
        if op.groups > 1:
            first = tile // (self.g.tiles // op.groups) * self.g.ci
        if self.flat:
            return (n * (x.h * x.w) + start + pixel) * x.lanes + first
        in_y = row * op.strides[0] + ky * op.dilations[0] - op.offset[0]
        in_x = (start + pixel) * op.strides[1] + kx * op.dilations[1] - op.offset[1]
        return x.offset(n, 0, in_y, in_x) + first


TEMPLATE = KernelTemplate(
    name="q_conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    scratch=scratch,
    variant=variant,
    rank=1,
    arithmetic="int8",
    accumulator="int32",
)
