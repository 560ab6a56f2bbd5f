"""3x3 convolution of codes by Winograd's F(2x2, 3x3): exact, in int16 and int32.

As ``winograd`` has it (Lavin and Gray 2016, arXiv 1509.09308), with twice the matrix G, whose
entries are then whole: weights become int16 of at most 9 times a code, inputs of at most 4 times,
and what a tile's products come to is four times the result. It is halved after each of the two
transforms, both times without a rest: along one side it is twice a convolution already.

Where instructions multiply int16 anyhow, or bytes with much ado, that takes 16 products for 36.
Weights of 8 or 4 bits come as they are and are transformed while running:
``U [tile][16][ci / step][width][step]``, ``V [16][place][ci]`` in int16,
``M [16][place][width]`` in int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, kernel, load, loop, minimum, splat, store
from edgepipe.kernels.dot import half, reinterpret
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, finished, vectors
from edgepipe.kernels.requantize import put_pixels
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.winograd_loops import (
    APART,
    TAPS,
    Loops,
    along,
    parts,
    points_of,
    strip,
    tiles_of,
)
from edgepipe.kernels.winograd_transforms import kept
from edgepipe.target import Target

SIDE = 2
_POINTS = points_of(SIDE)


@dataclass(frozen=True)
class Way:
    """How int16 are multiplied: ``lanes`` channels of output at a time, ``step`` of input.

    ``tiles`` are register tiles ``(places, vectors)``, the best first. Few vectors keep M small.
    ``channels`` and ``count`` are those, and the tiles of an image, below which the transforms take
    what the products save.
    """

    lanes: int
    step: int
    tiles: tuple[tuple[int, int], ...]
    channels: int
    count: int


#: i32x4.dot_i16x8_s
PAIRS = Way(4, 2, ((4, 2), (8, 1)), 16, 16)


def way_of(target: Target) -> Way | None:
    """None where 8-bit products are cheaper than these."""
    if target.integer.dot == "maddubs":  # VPMADDWD
        return Way(8, 2, ((10, 1), (9, 1), (8, 1), (7, 1)), 32, 25)
    if target.integer.dot == "pairs":
        return PAIRS
    if target.integer.dot == "mlal":  # SMLAL by element
        large = target.simd.registers == 32
        tiles = ((10, 2), (9, 2), (8, 2), (7, 2)) if large else ((4, 2), (3, 2))
        return Way(4, 1, tiles, 16, 16)
    return None


#: Bytes of transformed inputs of a strip: products, four bytes each, are between two of them.
_STRIP_BYTES = 1 << 17
#: Types of U, V and M, and how many workspaces that is.
TYPES = ("int16", "int16", "int32")
WORKSPACES = len(TYPES)
#: What sums of products, and of three of them, must fit.
_INT32 = 2**31


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or op.stored:
        return ""
    way = way_of(target)
    return "" if way is None else unfit(op, way)


def unfit(op: QConvOp, way: Way) -> str | None:
    """Why it cannot run ``op`` so, or would not be faster; None where it would."""
    if op.kernel != (3, 3) or op.groups > 1 or op.x.blocks > 1:
        return ""
    if op.strides != (1, 1) or op.dilations != (1, 1):
        return "it has strides or dilations"
    if min(op.y.h, op.y.w) < SIDE:
        return "its output is smaller than a tile"
    if op.x.lanes % 8 or channels_of(op) % 8 or op.y.lanes % way.lanes:
        return "its channels do not fill vectors of 8"
    if any(r.layout.lanes < channels_of(op) for r in op.residuals):
        return "the channels of what is added do not fill vectors of 8"
    if min(op.x.c, op.y.c) < way.channels or tiles_of(op.y, SIDE) < way.count:
        return f"fewer than {way.channels} channels or {way.count} tiles of 2x2 outputs"
    # A sum of three products, along one side: (3 · 3 weights) · (2 · 2 inputs) at most, twice.
    if op.x.lanes * TAPS * op.limit * 4 * 255 * 2 >= _INT32:
        return "its sums may leave int32"
    return None


def channels_of(op: QConvOp) -> int:
    """Output channels, those that fill the last vector included."""
    return op.y.lanes * op.y.blocks


def default(op: QConvOp, target: Target) -> Knobs:
    way = way_of(target)
    assert way is not None
    return knobs_of(op, way, target.arch)


def knobs_of(op: QConvOp, way: Way, arch: str) -> Knobs:
    inputs, count = op.x.lanes, channels_of(op) // way.lanes
    least = min(vectors for _, vectors in way.tiles)
    splits = parts(count // least, 2 * _POINTS * inputs * way.lanes * least)

    def tile(places: int) -> tuple[int, int]:
        fits = [(min(p, places), v) for p, v in way.tiles if count // splits % v == 0]

        def waste(choice: tuple[int, int]) -> float:
            return round(-(-places // choice[0]) * choice[0] / places, 1)

        return min(fits, key=lambda choice: (waste(choice), fits.index(choice)))

    rows = strip(op.y, SIDE, 2 * _POINTS * inputs, lambda places: tile(places)[0], _STRIP_BYTES)
    pixels, blocks = tile(rows * along(op.y.w, SIDE))
    return {
        "rows": rows,
        "splits": splits,
        "pixels": pixels,
        "blocks": blocks,
        "lanes": way.lanes,
        "step": way.step,
        "arch": arch,
    }


def settings(op: QConvOp, target: Target) -> list[Knobs]:
    """Other strips, parts of the channels and register tiles."""
    base, way = default(op, target), way_of(target)
    assert way is not None
    down, across, count = along(op.y.h, SIDE), along(op.y.w, SIDE), channels_of(op) // way.lanes
    return [
        {**base, "rows": rows, "splits": splits, "pixels": pixels, "blocks": blocks}
        for rows in sorted({1, 2, 4, base["rows"], -(-down // 2), down})
        for splits in (1, 2, 4, 8)
        for pixels, blocks in way.tiles
        if rows <= down and count % (splits * blocks) == 0 and pixels <= rows * across
    ]  # fmt: skip


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, 3, 3]`` int8, ``b[co]`` int32, ``m[co]`` float32 →
    ``[tile][ci / step][3][3][width][step]``, the codes of 4 bits of two steps in a byte."""
    weight = arrays[0]
    step, width = knobs["step"], knobs["blocks"] * knobs["lanes"]
    co, ci = weight.shape[:2]
    grown = np.zeros((channels_of(op), op.x.lanes, 3, 3), np.int8)
    grown[:co, :ci] = weight
    tiles = grown.reshape(-1, width, op.x.lanes // step, step, 3, 3)
    packed = np.ascontiguousarray(tiles.transpose(0, 2, 4, 5, 1, 3))
    if op.bits == 4:
        nibbles = (packed + np.int8(0 if _signed(knobs) else 8)).view(np.uint8) & 15
        packed = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(np.int8)
    return [packed, *vectors(op, arrays, channels_of(op))]


def _signed(knobs: Knobs) -> bool:
    """Whether codes of 4 bits are stored with their sign; see ``dot.nibble``."""
    return knobs["arch"] in ("aarch64", "arm")


def executed(op: QConvOp, knobs: Knobs) -> int:
    """The products; the sums and differences of the transforms are left out."""
    return op.y.n * tiles_of(op.y, SIDE) * _POINTS * op.x.lanes * channels_of(op)


#: Vector instructions of transforms, loads and stores included: of a tile's inputs, of a vector of
#: sums up to int32, of a vector of weights.
_OF_INPUTS, _OF_SUMS, _OF_WEIGHTS = 72, 56, 70


def instructions(op: QConvOp, target: Target, end: float) -> float:
    """Vector instructions by the register tiles; the end of a vector of sums takes ``end``."""
    knobs = default(op, target)
    pixels, blocks, lanes, step = (knobs[k] for k in ("pixels", "blocks", "lanes", "step"))
    tiles, count, inputs = op.y.n * tiles_of(op.y, SIDE), channels_of(op) // lanes, op.x.lanes
    if step == 1:  # eight inputs of a place, and two vectors of weights, in one load
        each = inputs * (pixels * blocks + blocks / 2 + pixels / 8)
    else:  # a multiplication and an addition
        each = inputs / 2 * (2 * pixels * blocks + blocks + pixels)
    multiplied = _POINTS * tiles / pixels * (count / blocks) * (each + 2 * pixels * blocks)
    wide = 16 if target.arch == "x86_64" and inputs % 16 == 0 else 8
    of_inputs = tiles * inputs / wide * knobs["splits"] * _OF_INPUTS
    of_outputs = tiles * count * (_OF_SUMS + SIDE * SIDE * end)
    of_weights = op.y.n * inputs / (16 if lanes == 8 else 8) * channels_of(op) * _OF_WEIGHTS
    return float(multiplied + of_inputs + of_outputs + of_weights)


def emit(op: QConvOp, knobs: Knobs) -> Any:
    weights = channels_of(op) * op.x.lanes * TAPS * op.bits // 8, "int8"
    held = arguments(op, weights, channels_of(op))
    return kernel("q_winograd", held, lambda *buffers: Emission(op, knobs, buffers).run())


class Emission(Loops):
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        super().__init__(op.y, SIDE, knobs, channels_of(op) // knobs["lanes"])
        self.op, self.lanes, self.step, self.arch = op, knobs["lanes"], knobs["step"], knobs["arch"]
        self.source, self.weights, self.bias, self.multipliers, *self.residuals, self.target = (
            buffers
        )
        self.inputs, self.width = op.x.lanes, self.blocks * self.lanes
        #: Weights of a vector that is multiplied, and of one that is transformed.
        self.elements = self.lanes * self.step
        self.loaded = 8 if self.step == 1 and self.blocks % 2 == 0 else self.elements

        #: Elements of a point: in the weights of a register tile, all inputs, all products.
        self.of_weights = self.inputs * self.width + APART // 2
        self.of_inputs = self.inputs * self.places + APART // 2
        self.of_products = self.places * self.width + APART // 4

    def run(self) -> None:
        self.u, self.v, self.m = self.workspaces()
        super().run()

    def sizes(self) -> list[int]:
        """Elements of U, V and M."""
        each = self.tiles * self.of_weights, self.of_inputs, self.of_products
        return [_POINTS * count for count in each]

    def workspaces(self) -> list[Any]:
        """U, V and M."""
        sizes = zip(self.sizes(), TYPES, strict=True)
        return [T.alloc_buffer((size,), dtype, scope="local") for size, dtype in sizes]

    def transform_weights(self, split: Any) -> None:
        steps, together, size = self.inputs // self.step, 8 // self.op.bits, self.loaded
        row = self.width * self.step
        with loop(self.tiles) as tile, loop(steps // together) as s, loop(row // size) as j:
            first = ((split * self.tiles + tile) * (steps // together) + s) * TAPS * row + j * size
            for which in range(together):
                g = [
                    [self.codes(first + (3 * y + x) * row, which) for x in range(3)]
                    for y in range(3)
                ]
                taps = [code for line in g for code in line]
                self.put(tile, (s * together + which) * row + j * size, taps)

    def put(self, tile: Any, at: Any, taps: Sequence[Any]) -> None:
        """Transform the nine taps of a vector, and store each at ``at`` of its point's weights."""
        columns = [self.filtered(taps[x::3]) for x in range(3)]
        for p in range(4):
            for q, value in enumerate(self.filtered([columns[x][p] for x in range(3)])):
                point = (tile * _POINTS + 4 * p + q) * self.of_weights
                store(self.u, point + at, value, self.loaded)

    def codes(self, place: Any, which: int) -> Any:
        """A vector of weights as int16."""
        codes = load(self.weights, place, self.loaded)
        if self.op.bits == 4:
            codes = dot.nibble(codes, self.loaded, which, self.arch, 0)
        return tirx.Cast(f"int16x{self.loaded}", codes)

    def filtered(self, g: Sequence[Any]) -> list[Any]:
        """2 G of three taps."""
        lanes = self.loaded
        g = kept(g, lanes, "int16")
        (outer,) = kept([g[0] + g[2]], lanes, "int16")
        first, last = (v + v for v in (g[0], g[2]))
        return kept([first, outer + g[1], outer - g[1], last], lanes, "int16")

    def transform_inputs(self, n: Any, first: Any) -> None:
        x = self.op.x
        lanes = 16 if self.arch == "x86_64" and self.inputs % 16 == 0 else 8
        wide = f"int16x{lanes}"
        with loop(self.rows) as row, loop(self.across) as column, loop(self.inputs // lanes) as c:
            top, left = self.corner(first + row, column)
            top, left = top - self.op.offset[0], left - self.op.offset[1]
            base = T.bind(x.offset(n, 0, top, left) + c * lanes)
            columns = []
            for j in range(4):
                read = [load(self.source, base + (i * x.cols + j) * x.lanes, lanes)
                        for i in range(4)]  # fmt: skip
                codes = [tirx.Cast(wide, v) for v in kept(read, lanes, x.dtype)]
                columns.append(_differences(codes, lanes))
            to = T.bind((row * self.across + column) * self.inputs + c * lanes)
            for p in range(4):
                for q, value in enumerate(_differences([columns[j][p] for j in range(4)], lanes)):
                    at = to + (4 * p + q) * self.of_inputs
                    store(self.v, at, value, lanes)

    def multiply(self, first: tuple[Any, Any], part: Any, tile: Any) -> None:
        with loop(_POINTS) as point, loop(-(-self.places // self.pixels)) as group:
            # The last group overlaps its neighbour: the same values, stored twice.
            start = minimum(group * self.pixels, self.places - self.pixels)
            self.products(point, start, (part * _POINTS + point) * self.of_weights)
        self.transform_outputs(first, tile)

    def products(self, point: Any, start: Any, weights: Any) -> None:
        """One register tile of M, of the places from ``start`` on."""
        acc = Registers(self.pixels * self.blocks, self.lanes, "int32")
        for r in range(acc.count):
            acc[r] = splat(tirx.const(0, "int32"), self.lanes)
        places = point * self.of_inputs + start * self.inputs
        if self.step == 1:
            with loop(self.inputs // 8) as eight:
                self.by_element(acc, places + eight * 8, weights + eight * (8 * self.width))
        else:
            with loop(self.inputs // 2) as s:
                self.by_pairs(acc, places + s * 2, weights + s * (2 * self.width))
        for r in range(acc.count):
            at = point * self.of_products + start * self.width + r * self.lanes
            store(self.m, at, acc[r], self.lanes)

    def by_pairs(self, acc: Registers, place: Any, weights: Any) -> None:
        """Two input channels of every place: products added in pairs by one instruction."""
        ways = dot.named("pairs", self.lanes, True)
        inputs = Registers(self.pixels, 1, "int32")
        for i in range(self.pixels):
            inputs[i] = reinterpret("int32", load(self.v, place + i * self.inputs, 2))
        for j in range(self.blocks):
            held = load(self.u, weights + j * self.elements, self.elements)
            for i in range(self.pixels):
                r = i * self.blocks + j
                x = reinterpret(f"int16x{self.elements}", splat(inputs[i], self.lanes))
                acc[r] = ways.accumulate(acc[r], x, held)

    def by_element(self, acc: Registers, place: Any, weights: Any) -> None:
        """Eight input channels of every place, each an element of a register."""
        held = Registers(self.pixels, 8, "int16")
        for i in range(self.pixels):
            held[i] = load(self.v, place + i * self.inputs, 8)
        together = 2 if self.blocks % 2 == 0 else 1
        for lane in range(8):
            for j in range(0, self.blocks, together):
                u = load(self.u, weights + lane * self.width + j * 4, 4 * together)
                halves = [half(u, 8, 0), half(u, 8, 1)] if together == 2 else [u]
                for i in range(self.pixels):
                    for k, four in enumerate(halves):
                        r = i * self.blocks + j + k
                        acc[r] = dot.add_long(self.arch, acc[r], four, held.lane(i, lane))

    def transform_outputs(self, first: tuple[Any, Any], tile: Any) -> None:
        op, lanes, (n, top_row) = self.op, self.lanes, first
        together = min(self.blocks, 16 // lanes)
        parts_of_width = loop(self.blocks // together)
        with parts_of_width as part, loop(self.rows) as row, loop(self.across) as column:
            place = row * self.across + column
            top, left = self.corner(top_row + row, column)
            outputs = [(n, top + p, left + q) for p in range(SIDE) for q in range(SIDE)]
            channel = tile * self.width + part * (together * lanes)
            base = T.bind(place * self.width + part * (together * lanes))
            sums: list[list[Any]] = [[] for _ in outputs]
            for j in range(together):
                c = channel + j * lanes
                bias = load(self.bias, c, lanes)
                totals = self.totals(base + j * lanes)
                for output, into, total in zip(outputs, sums, totals, strict=True):
                    rest = output, c, lanes
                    value = finished(op, total + bias, self.multipliers, self.residuals, *rest)
                    into.append(value)
            put_pixels(self.target, op.y, outputs, channel, sums, op.limits, self.arch, lanes)

    def totals(self, base: Any) -> list[Any]:
        """The int32 sums of a tile's outputs, row by row."""
        lanes, size = self.lanes, self.of_products
        columns = [
            _halves([load(self.m, base + (4 * p + q) * size, lanes) for p in range(4)], lanes)
            for q in range(4)
        ]
        return [
            total
            for p in range(SIDE)
            for total in _halves([columns[q][p] for q in range(4)], lanes)
        ]


def _differences(d: Sequence[Any], lanes: int) -> list[Any]:
    """Bᵀ of a row of inputs."""
    return kept([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]], lanes, "int16")


def _halves(m: Sequence[Any], lanes: int) -> list[Any]:
    """Half of Aᵀ of a row of products, which is even."""
    m, one = kept(m, lanes, "int32"), splat(tirx.const(1, "int32"), lanes)
    sums = m[0] + m[1] + m[2], m[1] - m[2] - m[3]
    return kept([tirx.shift_right(s, one) for s in sums], lanes, "int32")


TEMPLATE = KernelTemplate(
    name="q_winograd",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    executed=executed,
    rank=3,
    arithmetic="int8",
    accumulator="int32",
)
