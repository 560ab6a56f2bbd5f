"""Depthwise convolution over blocked layouts: channels in the lanes, a tile of output pixels.

Each input vector of a row is loaded once and used by every tap of the tile that needs it. Weights
of small filters in other formats than float32 are unpacked, and scaled, once per channel block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import (
    Registers,
    fma,
    hidden,
    kernel,
    load,
    loop,
    minimum,
    parallel,
    zero_border,
)
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.unpack import TileWeights, half_conversion
from edgepipe.kernels.weights import grown, store
from edgepipe.target import Target

#: Float elements within which AArch64 loads two vectors with one instruction.
_REACH = 1008 // 4


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.groups == 1:
        return ""
    if op.groups != op.x.c or op.y.c != op.x.c:
        return "not one filter per channel"
    if op.x.lanes != op.y.lanes:
        return "input is not in the blocked layout"
    if op.weights.group:
        return "its weights have a scale per group"
    return None


def default(op: ConvOp, target: Target) -> Knobs:
    kh, kw = op.kernel
    registers = target.simd.registers
    # Half of the registers accumulate; the rest hold inputs and, where there is room, weights.
    # In WebAssembly LLVM's stack order keeps every loaded vector alive, so tiles are small.
    arm = target.arch in ("aarch64", "arm")
    wide = 2 if target.kind == "wasm" else 4 if registers <= 16 or arm else 7
    columns, rows = min(op.y.w, wide), 1
    if target.arch == "aarch64":
        columns, rows = _tile(op)
    return {
        "columns": columns,
        "rows": rows,
        # Unpacking costs more than the spills of a 5x5 filter.
        "keep_weights": kh * kw <= 9 and registers >= 32 if op.weights.plain else kh * kw <= 25,
        "fused": arm,
        "half": half_conversion(target),
        # Whether neighbours are loaded and stored one after another, two with one instruction.
        **({"pairs": True} if target.arch == "aarch64" else {}),
    }


def _tile(op: ConvOp) -> tuple[int, int]:
    """Columns and rows for 32 registers of four lanes: a whole row where it fits them, else what
    wastes least; two rows share inputs only without stride. By counted instructions."""
    width = op.y.w
    if width <= 14:
        return width, 1
    two_rows = op.strides == (1, 1) and op.y.h > 1
    columns = min((8, 4, 7) if two_rows else (14, 8, 7, 4), key=lambda n: -(-width // n) * n)
    return columns, 2 if two_rows else 1


def _apart(distance: int, length: int) -> Any:
    """``distance`` to ``length`` elements, hidden where pairs of vectors there are out of reach."""
    return hidden(distance) if distance + length > _REACH else distance


def settings(op: ConvOp, target: Target) -> list[Knobs]:
    """Other tiles of pixels; weights of float32 kept in registers or not. Sums keep their order."""
    base, most = default(op, target), target.simd.registers // 2
    keeping = (True, False) if op.weights.plain else (base["keep_weights"],)
    return [
        {**base, "columns": columns, "rows": rows, "keep_weights": keep}
        for rows in range(1, min(op.y.h, 4) + 1)
        for columns in range(1, min(op.y.w, most // rows) + 1)
        for keep in keeping
    ]


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, kh, kw]``, ``b[c]`` → ``[block][kh][kw][lane]`` and the padded bias.

    Codes come with their scales ``s[c]`` between the two.
    """
    weight, *scale_and_bias = arrays
    kh, kw = op.kernel
    taps = grown(weight.transpose(1, 2, 3, 0), op.y.blocks * op.y.lanes)
    blocked = taps.reshape(kh, kw, op.y.blocks, op.y.lanes).transpose(2, 0, 1, 3)
    vectors = (grown(np.asarray(a, np.float32), taps.shape[-1]) for a in scale_and_bias)
    return [store(op.weights, blocked), *vectors]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    lanes, taps = op.y.lanes, op.kernel[0] * op.kernel[1]
    inputs = [
        ("x", op.x.elements, "float32"),
        *op.weights.arguments(op.y.blocks * taps, lanes, op.y.blocks * lanes),
        ("b", op.y.blocks * lanes, "float32"),
    ]
    arguments = signature(op, inputs)
    return kernel("depthwise", arguments, lambda *buffers: _Emission(op, knobs, buffers).run())


class _Emission:
    """One kernel being emitted: the loops around a tile of pixels, and the tile itself."""

    def __init__(self, op: ConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs, self.lanes = op, knobs, op.y.lanes
        self.rows, self.columns = min(knobs["rows"], op.y.h), min(knobs["columns"], op.y.w)
        self.source, *rest = buffers
        packed, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
        self.bias, *self.residuals, self.target = rest
        shape = (1, self.lanes)
        self.weights = TileWeights(op.weights, packed, shape, knobs["half"], knobs["fused"])
        #: Weights of the current block of channels, where they stay in registers.
        self.kept: Registers | None = None

    def run(self) -> None:
        y, (kh, kw) = self.op.y, self.op.kernel
        with parallel(y.n) as n, parallel(y.blocks) as block:
            if self.knobs["keep_weights"]:
                self.kept = Registers(kh * kw, self.lanes)
                for tap in range(kh * kw):
                    (vector,) = self.weights.row(block * kh * kw, tap)
                    self.kept[tap] = self.weights.finished(vector, block * self.lanes, None)
            row_tiles, column_tiles = -(-y.h // self.rows), -(-y.w // self.columns)
            with parallel(row_tiles) as row_tile, loop(column_tiles) as column_tile:
                # The last tile of a dimension overlaps its neighbour.
                row = minimum(row_tile * self.rows, y.h - self.rows)
                column = minimum(column_tile * self.columns, y.w - self.columns)
                self.output_tile(n, block, row, column)
        zero_border(y, self.target)

    def output_tile(self, *at: Any) -> None:
        """``rows`` x ``columns`` pixels from ``at`` (n, block, row, column) on."""
        (n, block, row, column), y, pairs = at, self.op.y, self.knobs.get("pairs")
        acc = Registers(self.rows * self.columns, self.lanes)
        for p in range(self.rows * self.columns):
            value = self.bias_vector(block)
            acc[p] = value if self.kept is not None else self.weights.start(value)
        # One pass over the input rows of the tile; each feeds every output row it belongs to.
        (kh, _), (sy, _), (dy, _) = self.op.kernel, self.op.strides, self.op.dilations
        for below in sorted({r * sy + ky * dy for r in range(self.rows) for ky in range(kh)}):
            taps = [(r, *divmod(below - r * sy, dy)) for r in range(self.rows)]
            fed = [(r, ky) for r, ky, rest in taps if not rest and 0 <= ky < kh]
            (self.row_in_order if pairs else self.row_by_taps)(acc, at, below, fed)
        border = y.offset(0, 0, 0, 0)
        for r in range(self.rows):
            far = _apart(border + r * y.cols * self.lanes, self.columns * self.lanes)
            for i in range(self.columns):
                value = acc[r * self.columns + i]
                if self.kept is None:
                    channel, bias = block * self.lanes, self.bias_vector(block)
                    value = self.weights.finished(value, channel, bias)
                place = (n, block, row + r, column + i)
                to = y.offset(n, block, row, column) - border + far + i * self.lanes
                finish(self.op, self.residuals, self.target, place, value, to if pairs else None)

    def row_by_taps(
        self, acc: Registers, at: Sequence[Any], below: int, fed: Sequence[tuple[int, int]]
    ) -> None:
        """What row ``below`` of the tile's input adds to the rows that it feeds, (row, tap)."""
        (n, block, row, column), op = at, self.op
        for kx in range(op.kernel[1]):
            for r, ky in fed:
                for i in range(self.columns):
                    down = row * op.strides[0] + below - op.offset[0]
                    across = (column + i) * op.strides[1] + kx * op.dilations[1] - op.offset[1]
                    vector = load(self.source, op.x.offset(n, block, down, across), self.lanes)
                    self.multiply_add(acc, r * self.columns + i, vector, block, (ky, kx))

    def row_in_order(
        self, acc: Registers, at: Sequence[Any], below: int, fed: Sequence[tuple[int, int]]
    ) -> None:
        """The same sums in the same order per pixel, from one input vector after another."""
        (n, block, row, column), op, x = at, self.op, self.op.x
        ((sy, sx), (_, dx)), (_, kw) = (op.strides, op.dilations), op.kernel
        reach = (self.columns - 1) * sx + (kw - 1) * dx + 1
        start = x.offset(n, block, row * sy - op.offset[0], column * sx - op.offset[1])
        start = start + _apart(below * x.cols * self.lanes, reach * self.lanes)
        for across in range(reach):
            vector = load(self.source, start + across * self.lanes, self.lanes)
            for r, ky in fed:
                for i in range(self.columns):
                    kx, rest = divmod(across - i * sx, dx)
                    if not rest and 0 <= kx < kw:
                        self.multiply_add(acc, r * self.columns + i, vector, block, (ky, kx))

    def multiply_add(
        self, acc: Registers, p: int, vector: Any, block: Any, tap: tuple[int, int]
    ) -> None:
        """One input vector times the weights of one tap, onto accumulator ``p``."""
        (kh, kw), (ky, kx) = self.op.kernel, tap
        if self.kept is not None:
            weight = self.kept[ky * kw + kx]
        else:
            (weight,) = self.weights.row(block * kh * kw, ky * kw + kx)
        acc[p] = fma(vector, weight, acc[p], self.lanes, self.knobs["fused"])

    def bias_vector(self, block: Any) -> Any:
        return load(self.bias, block * self.lanes, self.lanes)


TEMPLATE = KernelTemplate(
    name="depthwise",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    rank=2,
)
