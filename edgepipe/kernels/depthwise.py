"""Depthwise convolution over blocked layouts: channels in the lanes, a tile of output pixels.

Each input vector of a row is loaded once and used by every tap of the tile that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import (
    Registers,
    fma,
    kernel,
    load,
    loop,
    minimum,
    zero_border,
)
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.groups == 1:
        return ""
    if op.groups != op.x.c or op.y.c != op.x.c:
        return "not one filter per channel"
    if op.x.lanes != op.y.lanes:
        return "input is not in the blocked layout"
    return None


def default(op: ConvOp, target: Target) -> Knobs:
    kh, kw = op.kernel
    registers = target.simd.registers
    # Half of the registers accumulate; the rest hold inputs and, where there is room, weights.
    # In WebAssembly LLVM's stack order keeps every loaded vector alive, so tiles are small.
    arm = target.arch in ("aarch64", "arm")
    wide = 2 if target.kind == "wasm" else 4 if registers <= 16 or arm else 7
    columns = min(op.y.w, wide)
    rows = 2 if target.arch == "aarch64" and op.y.h > 1 else 1
    return {
        "columns": columns,
        "rows": rows,
        "keep_weights": kh * kw <= 9 and registers >= 32,
        "fused": arm,
    }


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, kh, kw]``, ``b[c]`` → ``[block][kh][kw][lane]`` and the padded bias."""
    weight, bias = arrays
    c, _, kh, kw = weight.shape
    grown = np.zeros((op.y.blocks * op.y.lanes, kh, kw), np.float32)
    grown[:c] = weight[:, 0]
    blocked = grown.reshape(op.y.blocks, op.y.lanes, kh, kw).transpose(0, 2, 3, 1)
    padded_bias = np.zeros(op.y.blocks * op.y.lanes, np.float32)
    padded_bias[:c] = bias
    return [np.ascontiguousarray(blocked), padded_bias]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    x, y, lanes = op.x, op.y, op.y.lanes
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.strides, op.dilations
    rows, columns = min(knobs["rows"], y.h), min(knobs["columns"], y.w)

    def body(*buffers: Any) -> None:
        source, weights, bias, *residuals, target = buffers

        def output_tile(n: Any, block: Any, kept: Any, row: Any, column: Any) -> None:
            def weight(ky: int, kx: int) -> Any:
                tap = ky * kw + kx
                if kept is not None:
                    return kept[tap]
                return load(weights, (block * kh * kw + tap) * lanes, lanes)

            acc = Registers(rows * columns, lanes)
            for at in range(rows * columns):
                acc[at] = load(bias, block * lanes, lanes)
            # One pass over the input rows of the tile; each feeds every output row it belongs to.
            for input_row in sorted({r * sy + ky * dy for r in range(rows) for ky in range(kh)}):
                for kx in range(kw):
                    for r in range(rows):
                        ky, rest = divmod(input_row - r * sy, dy)
                        if rest or not 0 <= ky < kh:
                            continue
                        for i in range(columns):
                            vector = load(
                                source,
                                x.offset(
                                    n,
                                    block,
                                    row * sy + input_row - op.offset[0],
                                    (column + i) * sx + kx * dx - op.offset[1],
                                ),
                                lanes,
                            )
                            at = r * columns + i
                            acc[at] = fma(vector, weight(ky, kx), acc[at], lanes, knobs["fused"])
            for r in range(rows):
                for i in range(columns):
                    place = (n, block, row + r, column + i)
                    finish(op, residuals, target, place, acc[r * columns + i])

        with loop(y.n) as n, loop(y.blocks) as block:
            kept = None
            if knobs["keep_weights"]:
                kept = Registers(kh * kw, lanes)
                for tap in range(kh * kw):
                    kept[tap] = load(weights, (block * kh * kw + tap) * lanes, lanes)
            with loop(-(-y.h // rows)) as row_tile, loop(-(-y.w // columns)) as column_tile:
                # The last tile of a dimension overlaps its neighbour.
                row = minimum(row_tile * rows, y.h - rows)
                column = minimum(column_tile * columns, y.w - columns)
                output_tile(n, block, kept, row, column)
        zero_border(y, target)

    inputs = [
        ("x", x.elements, "float32"),
        ("w", y.blocks * kh * kw * lanes, "float32"),
        ("b", y.blocks * lanes, "float32"),
    ]
    return kernel("depthwise", signature(op, inputs), body)


TEMPLATE = KernelTemplate(
    name="depthwise", matches=matches, default=default, emit=emit, pack=pack, rank=2
)
