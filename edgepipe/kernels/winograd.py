"""3x3 convolution by Winograd's minimal filtering: F(2x2, 3x3), 16 products for what takes 36, and
F(4x4, 3x3), 36 for 144.

Lavin and Gray 2016, arXiv 1509.09308. A tile of n x n inputs, n = 4 or 6, becomes as many sums and
differences, so do the 3x3 weights of every pair of channels; their products, added up over input
channels, are n x n matrix products, and a tile of outputs is sums and differences of the results.

Weights come as they are and are transformed while running, a part of the output channels at a
time; stored ready, ``weights.bin`` would have 16/9 or 4 times its bytes. Inputs are transformed a
strip of tile rows at a time. Both, and the products of one register tile's channels, lie in
workspaces:
``U [tile][n·n][ci][width]``, ``V [n·n][ci block][place][lanes]``, ``M [n·n][place][width]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import conv_tile
from edgepipe.kernels.builder import (
    Registers,
    float32,
    fma,
    kernel,
    load,
    loop,
    minimum,
    splat,
    store,
)
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.weights import grown
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
from edgepipe.kernels.winograd_transforms import Transforms
from edgepipe.target import Target

#: Channels and tiles below which the transforms take what the products save. On Arm products weigh
#: more beside the memory that transformed weights go through.
_LEAST_CHANNELS, _LEAST_TILES, _LEAST_TILES_ARM = 32, 25, 16
#: Tiles of 4x4 outputs from which weights of four times their bytes pay: 49 save 16 to 24 % on x86
#: and in WebAssembly, 196 about 40 %, but 16 double the time (measured).
_LEAST_LARGE = 49


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.kernel != (3, 3) or op.groups > 1 or op.sparse is not None:
        return ""
    if not op.weights.plain or op.x.lanes != op.y.lanes or op.y.lanes == 1:
        return ""
    if op.strides != (1, 1) or op.dilations != (1, 1):
        return "it has strides or dilations"
    if min(op.y.h, op.y.w) < 2:
        return "its output is smaller than a tile"
    least = _LEAST_TILES_ARM if target.arch in ("aarch64", "arm") else _LEAST_TILES
    if min(op.x.c, op.y.c) < _LEAST_CHANNELS or tiles_of(op.y, 2) < least:
        return f"fewer than {_LEAST_CHANNELS} channels or {least} tiles of 2x2 outputs"
    return None


def default(op: ConvOp, target: Target) -> Knobs:
    large = min(op.y.h, op.y.w) >= 4 and tiles_of(op.y, 4) >= _LEAST_LARGE
    side = 4 if large else 2
    inputs, points = op.x.blocks * op.x.lanes, points_of(side)
    splits = parts(op.y.blocks, 4 * points * inputs * op.y.lanes)
    by_element = target.arch in ("aarch64", "arm") and op.x.lanes == 4

    def tile(places: int) -> tuple[int, int]:
        fits = op.y.blocks // splits
        return conv_tile.tile(target, fits, places, op.weights, by_element, inputs, op.x.lanes)

    rows = strip(op.y, side, 4 * points * inputs, lambda places: tile(places)[0])
    pixels, blocks = tile(rows * along(op.y.w, side))
    return {
        "side": side,
        "rows": rows,
        "splits": splits,
        "pixels": pixels,
        "blocks": blocks,
        # For the reasons that the direct kernel has.
        "channel_loop": target.kind == "wasm",
        "by_element": by_element,
        "fused": target.simd.fma and target.arch in ("aarch64", "arm"),
    }


def settings(op: ConvOp, target: Target) -> list[Knobs]:
    """Other strips, parts of the channels and register tiles; sums keep their order."""
    base = default(op, target)
    down, across = (along(length, base["side"]) for length in (op.y.h, op.y.w))
    tiles = {
        (knobs["pixels"], knobs["blocks"])
        for knobs in conv_tile.settings(op, target)
        if knobs["blocks"] > 1 or op.y.blocks == 1
    }
    return [
        {**base, "rows": rows, "splits": splits, "pixels": pixels, "blocks": blocks}
        for rows in sorted({1, 2, 4, base["rows"], -(-down // 2), down})
        for splits in (1, 2, 4, 8)
        for pixels, blocks in sorted(tiles)
        if rows <= down and op.y.blocks % (splits * blocks) == 0 and pixels <= rows * across
    ]


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, 3, 3]``, ``b[co]`` → ``[tile][ci][3][3][blocks * lanes]`` and a padded bias."""
    weight, bias = arrays
    co, ci = weight.shape[:2]
    width, lanes = knobs["blocks"] * op.y.lanes, op.x.lanes
    spread = np.zeros((op.y.blocks * op.y.lanes, op.x.blocks * lanes, 3, 3), np.float32)
    spread[:co, :ci] = weight
    tiles = spread.reshape(-1, width, *spread.shape[1:])
    packed = np.ascontiguousarray(tiles.transpose(0, 2, 3, 4, 1))
    return [packed, grown(np.asarray(bias, np.float32), op.y.blocks * op.y.lanes)]


def executed(op: ConvOp, knobs: Knobs) -> int:
    """The products; the sums and differences of the transforms are left out."""
    channels, side = op.x.blocks * op.x.lanes * op.y.blocks * op.y.lanes, knobs.get("side", 2)
    return op.y.n * tiles_of(op.y, side) * points_of(side) * channels


#: Vector instructions of transforms by ``side``, loads and stores included: of a tile's inputs, of
#: its products, of the weights of a channel and a vector.
_TRANSFORMS = {2: (64, 48, 53), 4: (240, 190, 140)}


def instructions(op: ConvOp, target: Target, products: int, broadcasts: int) -> float:
    """Vector instructions by the register tiles; a multiply-add takes ``products``, a scalar in
    all lanes ``broadcasts``."""
    knobs = default(op, target)
    side, pixels, blocks, splits = (knobs[k] for k in ("side", "pixels", "blocks", "splits"))
    tiles, inputs = op.y.n * tiles_of(op.y, side), op.x.blocks * op.x.lanes
    scalars = pixels / op.x.lanes if knobs["by_element"] else pixels * broadcasts
    each = inputs * (pixels * blocks * products + blocks + scalars) + 2 * pixels * blocks
    multiplied = points_of(side) * tiles / pixels * (op.y.blocks / blocks) * each
    of_inputs, of_products, of_weights = _TRANSFORMS[side]
    transformed = tiles * (op.x.blocks * of_inputs * splits + op.y.blocks * of_products)
    return float(multiplied + transformed + op.y.n * inputs * op.y.blocks * of_weights)


def emit(op: ConvOp, knobs: Knobs) -> Any:
    channels = op.y.blocks * op.y.lanes
    inputs = [
        ("x", op.x.elements, "float32"),
        ("w", op.x.blocks * op.x.lanes * TAPS * channels, "float32"),
        ("b", channels, "float32"),
    ]
    return kernel("winograd", signature(op, inputs), lambda *held: _Emission(op, knobs, held).run())


class _Emission(Loops):
    """One kernel being emitted."""

    def __init__(self, op: ConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        super().__init__(op.y, knobs.get("side", 2), knobs, op.y.blocks)
        self.op, self.knobs, self.lanes = op, knobs, op.y.lanes
        self.source, self.weights, self.bias, *self.residuals, self.target = buffers
        self.transforms = Transforms(self.side, self.lanes, knobs["fused"])
        self.width, self.inputs = self.blocks * self.lanes, op.x.blocks * op.x.lanes

        def workspace(elements: int) -> Any:
            return T.alloc_buffer((self.points * elements,), "float32", scope="local")

        #: Elements of a point: in the weights of a register tile, all inputs, all products.
        self.of_weights = self.inputs * self.width + APART // 4
        self.of_inputs = self.inputs * self.places + APART // 4
        self.u = workspace(self.tiles * self.of_weights)
        self.v = workspace(self.of_inputs)
        self.of_products = self.places * self.width + APART // 4
        self.m = workspace(self.of_products)

    def transform_weights(self, split: Any) -> None:
        """U = G g Gᵀ."""
        lanes = self.lanes
        with loop(self.tiles) as tile, loop(self.inputs) as c:
            first = ((split * self.tiles + tile) * self.inputs + c) * TAPS * self.width
            with loop(self.blocks) as j:
                g = [
                    [load(self.weights, first + (3 * y + x) * self.width + j * lanes, lanes)
                     for x in range(3)]
                    for y in range(3)
                ]  # fmt: skip
                columns = [self.transforms.filtered([g[y][x] for y in range(3)]) for x in range(3)]
                for p in range(self.n):
                    points = self.transforms.filtered([columns[x][p] for x in range(3)])
                    for q in range(self.n):
                        at = (tile * self.points + self.n * p + q) * self.of_weights
                        store(self.u, at + c * self.width + j * lanes, points[q], lanes)

    def transform_inputs(self, n: Any, first: Any) -> None:
        """V = Bᵀ d B of the tiles from row ``first`` on."""
        x, lanes = self.op.x, self.lanes
        with loop(x.blocks) as block, loop(self.rows) as row, loop(self.across) as column:
            top, left = self.corner(first + row, column)
            top, left = top - self.op.offset[0], left - self.op.offset[1]
            columns = [
                self.transforms.differences(
                    [load(self.source, x.offset(n, block, top + i, left + j), lanes)
                     for i in range(self.n)]
                )
                for j in range(self.n)
            ]  # fmt: skip
            place = row * self.across + column
            for p in range(self.n):
                points = self.transforms.differences([columns[j][p] for j in range(self.n)])
                for q in range(self.n):
                    at = (self.n * p + q) * self.of_inputs + (block * self.places + place) * lanes
                    store(self.v, at, points[q], lanes)

    def multiply(self, first: tuple[Any, Any], part: Any, tile: Any) -> None:
        self.products(part)
        self.transform_outputs(*first, tile)

    def products(self, tile: Any) -> None:
        """M = U V."""
        lanes = self.lanes
        groups = -(-self.places // self.pixels)
        with loop(self.points) as point, loop(groups) as group:
            # The last group overlaps its neighbour: the same values, stored twice.
            start = minimum(group * self.pixels, self.places - self.pixels)
            acc = Registers(self.pixels * self.blocks, lanes)
            for r in range(acc.count):
                acc[r] = splat(float32(0), lanes)
            weights = (tile * self.points + point) * self.of_weights
            with loop(self.op.x.blocks) as block:
                inputs = point * self.of_inputs + (block * self.places + start) * lanes
                if self.knobs["channel_loop"]:
                    with loop(lanes) as lane:
                        self.multiply_add(acc, inputs, weights, block * lanes + lane, lane)
                else:
                    self.block(acc, inputs, weights, block * lanes)
            for i in range(self.pixels):
                for j in range(self.blocks):
                    at = point * self.of_products + (start + i) * self.width + j * lanes
                    store(self.m, at, acc[i * self.blocks + j], lanes)

    def block(self, acc: Registers, inputs: Any, weights: Any, channel: Any) -> None:
        """All channels of one input block, unrolled."""
        held = None
        if self.knobs["by_element"]:
            held = Registers(self.pixels, self.lanes)
            for i in range(self.pixels):
                held[i] = load(self.v, inputs + i * self.lanes, self.lanes)
        for lane in range(self.lanes):
            self.multiply_add(acc, inputs, weights, channel + lane, lane, held)

    def multiply_add(
        self, acc: Registers, inputs: Any, weights: Any, channel: Any, lane: Any,
        held: Registers | None = None,
    ) -> None:  # fmt: skip
        """One input channel of every place times a row of U."""
        lanes, fused = self.lanes, self.knobs["fused"]
        row = weights + channel * self.width
        places = [(i, j) for i in range(self.pixels) for j in range(self.blocks)]
        if held is not None:  # the scalars are in registers: one weight at a time fits as well
            places.sort(key=lambda place: place[1])
        for i, j in places:
            scalar = self.v[inputs + i * lanes + lane] if held is None else held.lane(i, lane)
            weight, r = load(self.u, row + j * lanes, lanes), i * self.blocks + j
            acc[r] = fma(splat(scalar, lanes), weight, acc[r], lanes, fused)

    def transform_outputs(self, n: Any, first: Any, tile: Any) -> None:
        """Aᵀ M A, bias and epilogue of one register tile's channels."""
        lanes = self.lanes
        with loop(self.blocks) as j, loop(self.rows) as row, loop(self.across) as column:
            block, place = tile * self.blocks + j, row * self.across + column
            first_lane = place * self.width + j * lanes
            columns = [
                self.transforms.sums(
                    [load(self.m, (self.n * p + q) * self.of_products + first_lane, lanes)
                     for p in range(self.n)]
                )
                for q in range(self.n)
            ]  # fmt: skip
            bias = load(self.bias, block * lanes, lanes)
            top, left = self.corner(first + row, column)
            for p in range(self.side):
                for q, value in enumerate(
                    self.transforms.sums([columns[i][p] for i in range(self.n)])
                ):
                    with self.unless_moved(p, q, first + row, column):
                        at = (n, block, top + p, left + q)
                        finish(self.op, self.residuals, self.target, at, value + bias)

    @contextmanager
    def unless_moved(self, p: int, q: int, row: Any, column: Any) -> Iterator[None]:
        """Output (p, q) of a tile where no neighbour has it: with other products, the neighbour's
        bits are others, and threads must not race for them."""
        y, free = self.op.y, []
        if p < self.down * self.side - y.h:
            free.append(row < self.down - 1)
        if q < self.across * self.side - y.w:
            free.append(column < self.across - 1)
        if not free:
            yield
            return
        with T.If(tirx.all(*free)), T.Then():
            yield


TEMPLATE = KernelTemplate(
    name="winograd",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    executed=executed,
    rank=3,
)
