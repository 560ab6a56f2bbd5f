"""Convolution over planes with any pattern of weights: sparse times dense, row by row (CSR).

Each output channel walks its stored places; each place is one weight that is broadcast over a
register tile of pixels (Elsen et al. 2019, "Fast Sparse ConvNets", arXiv 1911.09723). Stride 1.
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
    index_dtype,
    kernel,
    parallel,
    splat,
    zero_border,
)
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import signature
from edgepipe.kernels.planes import Cut, Joined, put
from edgepipe.kernels.sparse import pack_rows
from edgepipe.kernels.sparse_shared import offsets
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.sparse is None or op.sparse.form != "rows":
        return ""
    if op.groups > 1 or not op.weights.plain or op.strides != (1, 1):
        return "grouped, strided, or its weights are not float32"
    return None if op.x.lanes == op.y.lanes == 1 else "it reads or writes blocks of channels"


def registers(target: Target) -> int:
    """Accumulators of a tile."""
    if target.kind == "wasm":  # V8 has 16 registers, and beyond 8 accumulators it spills
        return 8
    if target.simd.registers == 32:
        return 28 if target.arch == "aarch64" else 16
    return 13  # beside them the weight, and the input where it does not come from memory


def cut(op: ConvOp, target: Target) -> Cut:
    """The tiles of ``op`` on ``target``. Where the pixels that are read follow one another, vectors
    run on from row to row: over the plane where those that are written do so too, else over as
    many rows as cost least."""
    height, width, lanes, most = op.y.h, op.y.w, target.simd.lanes_f32, registers(target)
    plain = Cut.of(height, width, lanes, most)
    if op.kernel != (1, 1) or op.x.padded:
        return plain
    if not (op.y.padded or any(r.padded for r in op.residuals)):
        return Cut.of(1, height * width, lanes, most)
    joined = (Joined.whole(height, width, lanes, rows) for rows in range(2, height + 1))
    return min([plain, *(c for c in joined if c.count <= most)], key=_instructions)


def _instructions(tiles: Cut) -> int:
    """What a place costs: of each vector a load and a multiply-add, and its own part."""
    return tiles.tiles[0] * tiles.tiles[1] * (2 * tiles.count + 6)


def default(op: ConvOp, target: Target) -> Knobs:
    tiles = cut(op, target)
    return {
        **tiles.knobs(target),
        "flat": tiles.height < op.y.h,
        "joined": isinstance(tiles, Joined),
        "index": index_dtype(target.arch),
    }


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, kh, kw]``, ``b[co]`` → distances, where rows start, weights, bias; for larger
    kernels than 1x1 the offset of every place too."""
    weight, bias = arrays
    packed: list[np.ndarray] = list(pack_rows(np.asarray(weight, np.float32)))
    packed.append(np.asarray(bias, np.float32))
    if op.kernel != (1, 1):
        places = np.arange(op.x.c * op.kernel[0] * op.kernel[1])
        packed.append(offsets(op, places).astype(np.int32))
    return packed


def emit(op: ConvOp, knobs: Knobs) -> Any:
    assert op.sparse is not None
    inputs = [
        ("x", op.x.elements, "float32"),
        ("distances", op.sparse.places, "uint8"),
        ("starts", op.y.c + 1, "int32"),
        ("w", op.sparse.places, "float32"),
        ("b", op.y.c, "float32"),
    ]
    if op.kernel != (1, 1):
        inputs.append(("offsets", op.x.c * op.kernel[0] * op.kernel[1], "int32"))
    return kernel(
        "sparse_rows", signature(op, inputs), lambda *buffers: _Emission(op, knobs, buffers).run()
    )


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: ConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.fused, self.index = op, knobs["fused"], knobs["index"]
        source, self.distances, self.starts, weights, self.bias, *rest = buffers
        self.source, self.weights = bytes_of(source), bytes_of(weights)
        self.offsets = rest.pop(0) if op.kernel != (1, 1) else None
        *self.residuals, self.target = rest
        height, width = (1, op.y.h * op.y.w) if knobs["flat"] else (op.y.h, op.y.w)
        kind = Joined if knobs["joined"] else Cut
        self.cut = kind(height, width, knobs["rows"], knobs["vectors"], knobs["lanes"])

    def run(self) -> None:
        down, across = self.cut.tiles
        # Pixels outside of channels: the input of a tile stays in the first-level cache.
        with parallel(self.op.y.n) as n, parallel(down) as i, parallel(across) as j:
            row, column = self.cut.start(i, j)
            with parallel(self.op.y.c) as channel:
                self.register_tile(n, channel, row, column)
        zero_border(self.op.y, self.target)

    def register_tile(self, n: Any, channel: Any, row: Any, column: Any) -> None:
        lanes, op = self.cut.lanes, self.op
        acc = Registers(self.cut.count, lanes)
        for r in range(self.cut.count):
            acc[r] = splat(self.bias[channel], lanes)
        self.accumulate(acc, channel, op.x.offset(n, 0, row - op.offset[0], column - op.offset[1]))
        for r, (down, step) in enumerate(self.cut.places):
            if not isinstance(self.cut, Joined):
                place = (n, channel, row + down, column + step)
                put(op, self.residuals, self.target, place, acc[r], lanes)
                continue
            for first, count, below, beside in self.cut.runs(step):
                part = tirx.Shuffle([acc[r]], list(range(first, first + count)))
                place = (n, channel, row + below, column + beside)
                put(op, self.residuals, self.target, place, part, count)

    def accumulate(self, acc: Registers, channel: Any, tile: Any) -> None:
        """Go from one stored place to the next, and multiply-add its weight."""
        x, lanes = self.op.x, self.cut.lanes
        index = self.index
        first, tile = T.bind(self.starts[channel]), T.bind(4 * tirx.Cast(index, tile))
        weights = T.bind(4 * first)
        #: The byte of the place in the tile, or for larger kernels the number of the place.
        at = Registers(1, 1, index)
        at[0] = tile if self.offsets is None else tirx.const(0, index)
        with counting(self.starts[channel + 1] - first, 1, 4) as (number, weight):
            distance = tirx.Cast(index, self.distances[first + number])
            if self.offsets is None:
                at[0] = at[0] + distance * (4 * x.rows * x.cols)
                start = forward(at[0])
            else:
                at[0] = at[0] + distance
                start = forward(tile + 4 * tirx.Cast(index, self.offsets[at[0]]))
            value = floats(self.weights, weights + weight, 1)
            for r, (down, step) in enumerate(self.cut.places):
                vector = floats(self.source, start + 4 * (down * x.cols + step), lanes)
                acc[r] = fma(vector, splat(value, lanes), acc[r], lanes, self.fused)


TEMPLATE = KernelTemplate(
    name="sparse_rows", matches=matches, default=default, emit=emit, pack=pack, rank=3
)
