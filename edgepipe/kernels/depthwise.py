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
    x, y, lanes = op.x, op.y, op.y.lanes
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.strides, op.dilations
    rows, columns = min(knobs["rows"], y.h), min(knobs["columns"], y.w)
    reach = (columns - 1) * sx + (kw - 1) * dx + 1
    border = y.offset(0, 0, 0, 0)

    def body(*buffers: Any) -> None:
        source, *rest = buffers
        packed, (bias, *residuals, target) = rest[: op.weights.arrays], rest[op.weights.arrays :]
        weights = TileWeights(op.weights, packed, (1, lanes), knobs["half"], knobs["fused"])

        def output_tile(n: Any, block: Any, kept: Any, row: Any, column: Any) -> None:
            def weight(ky: int, kx: int) -> Any:
                tap = ky * kw + kx
                if kept is not None:
                    return kept[tap]
                return weights.row(block * kh * kw, tap)[0]

            acc = Registers(rows * columns, lanes)

            def multiply_add(at: int, vector: Any, ky: int, kx: int) -> None:
                acc[at] = fma(vector, weight(ky, kx), acc[at], lanes, knobs["fused"])

            for at in range(rows * columns):
                value = load(bias, block * lanes, lanes)
                acc[at] = value if kept is not None else weights.start(value)
            # One pass over the input rows of the tile; each feeds every output row it belongs to.
            for input_row in sorted({r * sy + ky * dy for r in range(rows) for ky in range(kh)}):
                taps = [(r, *divmod(input_row - r * sy, dy)) for r in range(rows)]
                fed = [(r, ky) for r, ky, rest in taps if not rest and 0 <= ky < kh]
                if knobs.get("pairs"):
                    start = x.offset(n, block, row * sy - op.offset[0], column * sx - op.offset[1])
                    start = start + _apart(input_row * x.cols * lanes, reach * lanes)
                    for across in range(reach):
                        vector = load(source, start + across * lanes, lanes)
                        for r, ky in fed:
                            for i in range(columns):
                                kx, rest = divmod(across - i * sx, dx)
                                if not rest and 0 <= kx < kw:
                                    multiply_add(r * columns + i, vector, ky, kx)
                    continue
                for kx in range(kw):
                    for r, ky in fed:
                        for i in range(columns):
                            down = row * sy + input_row - op.offset[0]
                            across = (column + i) * sx + kx * dx - op.offset[1]
                            vector = load(source, x.offset(n, block, down, across), lanes)
                            multiply_add(r * columns + i, vector, ky, kx)
            for r in range(rows):
                for i in range(columns):
                    place = (n, block, row + r, column + i)
                    value = acc[r * columns + i]
                    if kept is None:
                        offset = load(bias, block * lanes, lanes)
                        value = weights.finished(value, block * lanes, offset)
                    at = None
                    if knobs.get("pairs"):
                        far = _apart(border + r * y.cols * lanes, columns * lanes)
                        at = y.offset(n, block, row, column) - border + far + i * lanes
                    finish(op, residuals, target, place, value, at)

        with parallel(y.n) as n, parallel(y.blocks) as block:
            kept = None
            if knobs["keep_weights"]:
                kept = Registers(kh * kw, lanes)
                for tap in range(kh * kw):
                    (vector,) = weights.row(block * kh * kw, tap)
                    kept[tap] = weights.finished(vector, block * lanes, None)
            with parallel(-(-y.h // rows)) as row_tile, loop(-(-y.w // columns)) as column_tile:
                # The last tile of a dimension overlaps its neighbour.
                row = minimum(row_tile * rows, y.h - rows)
                column = minimum(column_tile * columns, y.w - columns)
                output_tile(n, block, kept, row, column)
        zero_border(y, target)

    inputs = [
        ("x", x.elements, "float32"),
        *op.weights.arguments(y.blocks * kh * kw, lanes, y.blocks * lanes),
        ("b", y.blocks * lanes, "float32"),
    ]
    return kernel("depthwise", signature(op, inputs), body)


TEMPLATE = KernelTemplate(
    name="depthwise",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    rank=2,
)
