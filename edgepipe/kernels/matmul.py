"""Row-major matrix products: dense layers, projections, products of two activations.

A register tile of ``rows`` x ``blocks * lanes`` columns accumulates over k. The last tile of a
dimension is moved back to overlap its neighbour, so that every access is a whole vector and
nothing is padded. A constant right operand is packed ``[tile][k][blocks * lanes]``, in any weight
format.

A single row of few columns has ``parts`` such tiles, which take turns along k and are added up in
the end: one alone would wait for its own last sum at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import (
    Registers,
    bytes_of,
    counting,
    float32,
    floats,
    fma,
    kernel,
    load,
    loop,
    minimum,
    parallel,
    splat,
    store,
)
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.unpack import TileWeights, half_conversion
from edgepipe.kernels.weights import WeightFormat, grouped
from edgepipe.kernels.weights import store as store_rows
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, MatmulOp) else ""


def _tiles(target: Target, weights: WeightFormat) -> list[tuple[int, int]]:
    """Register tiles ``(rows, vectors)`` to choose from, as for convolutions."""
    if target.kind == "wasm":
        return [(4, 2), (8, 1)]
    if target.simd.lanes_f32 == 16:
        return [(7, 2), (14, 1)] if weights.plain else [(14, 2), (7, 2), (14, 1)]
    if target.simd.registers == 32:
        return [(6, 4), (7, 3), (8, 2), (14, 1)] if weights.plain else [(8, 2), (14, 1)]
    return [(4, 2), (6, 1)] if target.arch == "arm" else [(6, 2), (12, 1)]


def default(op: MatmulOp, target: Target) -> Knobs:
    lanes = target.simd.lanes_f32
    while lanes > op.n:
        lanes //= 2
    wide = max(1, op.n // lanes)
    choices = _tiles(target, op.weights) if op.m > 1 else [(1, 8)]

    def waste(choice: tuple[int, int]) -> float:
        rows, blocks = min(choice[0], op.m), min(choice[1], wide)
        done = -(-op.m // rows) * rows * -(-op.n // (blocks * lanes)) * blocks * lanes
        return round(done / (op.m * op.n), 2)

    rows, blocks = min(choices, key=lambda c: (waste(c), choices.index(c)))
    blocks = min(blocks, wide)
    parts = 1 if op.m > 1 or op.weights.group else 1 << (8 // blocks).bit_length() - 1
    unroll = 1 if target.kind == "wasm" else 8 if op.weights.kind == "int4" else 4
    arm = target.arch in ("aarch64", "arm")
    return {
        "lanes": lanes,
        "rows": min(rows, op.m),
        "blocks": blocks,
        "parts": parts,
        # As for convolutions, an unrolled body spills in WebAssembly.
        "unroll": max(parts, min(unroll, op.k)),
        "by_element": arm and lanes == 4,
        "fused": arm,
        "half": half_conversion(target),
        # Whether k is counted in bytes instead of values; for one row at a time that has parts.
        "counted": target.kind == "wasm" and op.weights.plain and op.m > 1,
    }


def settings(op: MatmulOp, target: Target) -> list[Knobs]:
    """Other register tiles, and how many values of k are unrolled; sums keep their order."""
    base = default(op, target)
    wide, most = max(1, op.n // base["lanes"]), target.simd.registers - 2
    unrolls = (base["unroll"],) if op.weights.group else (1, 2, 4, 8)
    return [
        {**base, "rows": rows, "blocks": blocks, "unroll": unroll}
        for rows in range(1, min(op.m, most) + 1)
        for blocks in (1, 2, 3, 4, 6, 8)
        for unroll in unrolls
        if blocks <= wide and unroll <= op.k and rows * blocks * base["parts"] <= most
        if unroll % base["parts"] == 0
        if rows * blocks >= most // 3 or rows == op.m
    ]


def _tile_starts(n: int, width: int) -> list[int]:
    return [min(t * width, n - width) for t in range(-(-n // width))]


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` (and ``b[n]``) → tiles ``[tile][k][width]``; the bias stays as it is.

    Codes are followed by their scales, ``s[n]`` or ``s[groups, n]``.
    """
    if not op.constant:
        return list(arrays)
    weight, *rest = arrays
    width = knobs["blocks"] * knobs["lanes"]
    starts = _tile_starts(op.n, width)
    if op.weights.group:
        scale, *rest = rest
        rows, factors = grouped(op.weights, weight[None], scale[None], starts, width)
        return [store_rows(op.weights, rows), factors, *rest]
    tiles = np.stack([weight[:, start : start + width] for start in starts])
    return [store_rows(op.weights, tiles), *(np.asarray(a, np.float32) for a in rest)]


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    width = knobs["lanes"] * knobs["blocks"]
    arguments = [("a", (op.batch if op.a_batched else 1) * op.m * op.k, "float32")]
    if op.constant:
        tiles = -(-op.n // width)
        factors = tiles * width * op.weights.groups(op.k) if op.weights.group else op.n
        arguments += op.weights.arguments(tiles * op.k, width, factors)
    else:
        arguments.append(("b", (op.batch if op.b_batched else 1) * op.k * op.n, "float32"))
    if op.bias:
        arguments.append(("bias", op.n, "float32"))
    sizes = {"full": op.batch * op.m * op.n, "row": op.n}
    arguments += [(f"r{i}", sizes[kind], "float32") for i, kind in enumerate(op.residuals)]
    arguments.append(("y", op.batch * op.m * op.n, "float32"))
    name = "dense" if op.constant else "matmul"
    return kernel(name, arguments, lambda *buffers: _Emission(op, knobs, buffers).run())


class _Emission:
    """One kernel being emitted: the loops over tiles, and the register tile."""

    def __init__(self, op: MatmulOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs = op, knobs
        self.lanes, self.rows, self.blocks = knobs["lanes"], knobs["rows"], knobs["blocks"]
        self.parts, self.tile = knobs["parts"], self.rows * self.blocks
        self.width = self.lanes * self.blocks
        self.a, *rest, self.y = buffers
        right, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
        self.b = right[0]
        shape = (self.blocks, self.lanes)
        self.weights = TileWeights(op.weights, right, shape, knobs["half"], knobs["fused"])
        self.bias = rest.pop(0) if op.bias else None
        self.residuals = rest

    def run(self) -> None:
        op = self.op
        tiles, row_tiles = -(-op.n // self.width), -(-op.m // self.rows)
        with (
            parallel(op.batch) as batch,
            parallel(tiles) as tile,
            parallel(row_tiles) as row_tile,
        ):
            row = minimum(row_tile * self.rows, op.m - self.rows)
            column = minimum(tile * self.width, op.n - self.width)
            self.register_tile((batch, tile, row, column))

    def register_tile(self, at: tuple[Any, Any, Any, Any]) -> None:
        """Accumulate ``rows`` x ``blocks`` vectors over k, then apply the epilogue."""
        acc = Registers(self.parts * self.tile, self.lanes)
        for r in range(self.tile, acc.count):
            acc[r] = splat(float32(0), self.lanes)
        for j in range(self.blocks):
            start = self.weights.start(self.bias_vector(at[3] + j * self.lanes))
            for i in range(self.rows):
                acc[i * self.blocks + j] = start
        if self.op.weights.group:
            first = at[1] * self.op.weights.groups(self.op.k)
            for run in self.op.weights.runs(self.op.k):
                with loop(run.groups) as g:
                    self.steps(acc, at, run.channel + g * run.size, run.size)
                    self.weights.end_group(acc, first + run.group + g)
        else:
            self.steps(acc, at, 0, self.op.k)
        for r in range(self.tile, acc.count):
            acc[r % self.tile] = acc[r % self.tile] + acc[r]
        self.finish(acc, at)

    def steps(self, acc: Registers, at: tuple[Any, Any, Any, Any], first: Any, count: int) -> None:
        """Multiply-add ``count`` values of k from ``first`` on."""
        if self.knobs["counted"]:
            self.counted_steps(acc, at)
            return
        unroll = min(self.knobs["unroll"], count)
        with loop(count // unroll) as k:
            self.step(acc, at, first + k * unroll, unroll)
        if count % unroll:
            self.step(acc, at, first + count - count % unroll, count % unroll)

    def counted_steps(self, acc: Registers, at: tuple[Any, Any, Any, Any]) -> None:
        """The same for all of k; rows of either operand have constant distances."""
        a, b, lanes = bytes_of(self.a), bytes_of(self.b), self.lanes
        batch, tile, _, column = at
        row = 4 * (self.width if self.op.constant else self.op.n)
        first_a = T.bind(self.a_offset(at, 0, 0) * 4)
        batch = batch if self.op.b_batched else 0
        of_b = tile * self.op.k * row if self.op.constant else batch * self.op.k * row + column * 4
        first_b = T.bind(of_b)
        with counting(self.op.k, 4, row) as (in_a, in_b):
            vectors = [floats(b, first_b + in_b + 4 * lanes * j, lanes) for j in range(self.blocks)]
            for i in range(self.rows):
                scalar = floats(a, first_a + in_a + 4 * self.op.k * i, 1)
                for j in range(self.blocks):
                    r = i * self.blocks + j
                    acc[r] = fma(splat(scalar, lanes), vectors[j], acc[r], lanes, False)

    def bias_vector(self, column: Any) -> Any:
        return None if self.bias is None else load(self.bias, column, self.lanes)

    def step(self, acc: Registers, at: tuple[Any, Any, Any, Any], k: Any, count: int) -> None:
        """Multiply-add ``count`` values of k, unrolled."""
        lanes = self.lanes
        places = [(i, j) for i in range(self.rows) for j in range(self.blocks)]
        inputs = None
        if self.knobs["by_element"] and count == lanes:
            inputs = Registers(self.rows, lanes)
            for i in range(self.rows):
                inputs[i] = load(self.a, self.a_offset(at, i, k), lanes)
            places.sort(key=lambda place: place[1])  # one weight at a time, as in convolutions
        for u in range(count):
            vectors = self.b_vectors(at, k, u)
            for i, j in places:
                if inputs is None:
                    scalar = self.a[self.a_offset(at, i, k + u)]
                else:
                    scalar = inputs.lane(i, u)
                r = u % self.parts * self.tile + i * self.blocks + j
                acc[r] = fma(splat(scalar, lanes), vectors[j], acc[r], lanes, self.knobs["fused"])

    def a_offset(self, at: tuple[Any, Any, Any, Any], i: int, k: Any) -> Any:
        batch = at[0] if self.op.a_batched else 0
        return (batch * self.op.m + at[2] + i) * self.op.k + k

    def b_vectors(self, at: tuple[Any, Any, Any, Any], k: Any, u: int) -> list[Any]:
        """Row k + u of the right operand in the columns of the tile."""
        batch, tile, _, column = at
        if self.op.constant:
            return self.weights.row(tile * self.op.k + k, u)
        batch = batch if self.op.b_batched else 0
        first = (batch * self.op.k + k + u) * self.op.n + column
        return [load(self.b, first + j * self.lanes, self.lanes) for j in range(self.blocks)]

    def finish(self, acc: Registers, at: tuple[Any, Any, Any, Any]) -> None:
        batch, _, row, column = at
        for i in range(self.rows):
            for j in range(self.blocks):
                n = column + j * self.lanes
                place = (batch * self.op.m + row + i) * self.op.n + n
                operands = [
                    load(buffer, place if kind == "full" else n, self.lanes)
                    for buffer, kind in zip(self.residuals, self.op.residuals, strict=True)
                ]
                value = acc[i * self.blocks + j]
                value = self.weights.finished(value, n, self.bias_vector(n))
                value = apply(self.op.epilogue, value, self.lanes, operands)
                store(self.y, place, value, self.lanes)


TEMPLATE = KernelTemplate(
    name="matmul",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    version=2,
)
