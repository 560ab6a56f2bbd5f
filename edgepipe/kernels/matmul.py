"""Row-major matrix products: dense layers, projections, products of two activations.

A register tile of ``rows`` x ``blocks * lanes`` columns accumulates over k. The last tile of a
dimension is moved back to overlap its neighbour, so that every access is a whole vector and
nothing is padded. A constant right operand is packed ``[tile][k][blocks * lanes]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, MatmulOp) else ""


def _tiles(target: Target) -> list[tuple[int, int]]:
    """Register tiles ``(rows, vectors)`` to choose from, as for convolutions."""
    if target.kind == "wasm":
        return [(4, 2), (8, 1)]
    if target.simd.lanes_f32 == 16:
        return [(7, 2), (14, 1)]
    if target.simd.registers == 32:
        return [(6, 4), (7, 3), (8, 2), (14, 1)]
    return [(4, 2), (6, 1)] if target.arch == "arm" else [(6, 2), (12, 1)]


def default(op: MatmulOp, target: Target) -> Knobs:
    lanes = target.simd.lanes_f32
    while lanes > op.n:
        lanes //= 2
    wide = max(1, op.n // lanes)
    choices = _tiles(target) if op.m > 1 else [(1, 8)]

    def waste(choice: tuple[int, int]) -> float:
        rows, blocks = min(choice[0], op.m), min(choice[1], wide)
        done = -(-op.m // rows) * rows * -(-op.n // (blocks * lanes)) * blocks * lanes
        return round(done / (op.m * op.n), 2)

    rows, blocks = min(choices, key=lambda c: (waste(c), choices.index(c)))
    arm = target.arch in ("aarch64", "arm")
    return {
        "lanes": lanes,
        "rows": min(rows, op.m),
        "blocks": min(blocks, wide),
        # As for convolutions, an unrolled body spills in WebAssembly.
        "unroll": 1 if target.kind == "wasm" else min(4, op.k),
        "by_element": arm and lanes == 4,
        "fused": arm,
    }


def _tile_starts(n: int, width: int) -> list[int]:
    return [min(t * width, n - width) for t in range(-(-n // width))]


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` (and ``b[n]``) → tiles ``[tile][k][width]``; the bias stays as it is."""
    if not op.constant:
        return list(arrays)
    weight, *rest = arrays
    width = knobs["blocks"] * knobs["lanes"]
    tiles = [weight[:, start : start + width] for start in _tile_starts(op.n, width)]
    return [np.ascontiguousarray(np.stack(tiles), np.float32), *rest]


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    width = knobs["lanes"] * knobs["blocks"]
    if op.constant:
        b_elements = -(-op.n // width) * op.k * width
    else:
        b_elements = (op.batch if op.b_batched else 1) * op.k * op.n
    arguments = [
        ("a", (op.batch if op.a_batched else 1) * op.m * op.k, "float32"),
        ("b", b_elements, "float32"),
    ]
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
        self.a, self.b, *rest, self.y = buffers
        self.bias = rest.pop(0) if op.bias else None
        self.residuals = rest
        self.lanes, self.rows, self.blocks = knobs["lanes"], knobs["rows"], knobs["blocks"]
        self.width = self.lanes * self.blocks

    def run(self) -> None:
        op = self.op
        tiles, row_tiles = -(-op.n // self.width), -(-op.m // self.rows)
        with loop(op.batch) as batch, loop(tiles) as tile, loop(row_tiles) as row_tile:
            row = minimum(row_tile * self.rows, op.m - self.rows)
            column = minimum(tile * self.width, op.n - self.width)
            self.register_tile((batch, tile, row, column))

    def register_tile(self, at: tuple[Any, Any, Any, Any]) -> None:
        """Accumulate ``rows`` x ``blocks`` vectors over k, then apply the epilogue."""
        lanes, column, unroll = self.lanes, at[3], self.knobs["unroll"]
        acc = Registers(self.rows * self.blocks, lanes)
        for j in range(self.blocks):
            start = splat(float32(0), lanes)
            if self.bias is not None:
                start = load(self.bias, column + j * lanes, lanes)
            for i in range(self.rows):
                acc[i * self.blocks + j] = start
        with loop(self.op.k // unroll) as k:
            self.step(acc, at, k * unroll, unroll)
        if self.op.k % unroll:
            self.step(acc, at, self.op.k - self.op.k % unroll, self.op.k % unroll)
        self.finish(acc, at)

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
            for i, j in places:
                if inputs is None:
                    scalar = self.a[self.a_offset(at, i, k + u)]
                else:
                    scalar = inputs.lane(i, u)
                weight = load(self.b, self.b_offset(at, k + u, j), lanes)
                r = i * self.blocks + j
                acc[r] = fma(splat(scalar, lanes), weight, acc[r], lanes, self.knobs["fused"])

    def a_offset(self, at: tuple[Any, Any, Any, Any], i: int, k: Any) -> Any:
        batch = at[0] if self.op.a_batched else 0
        return (batch * self.op.m + at[2] + i) * self.op.k + k

    def b_offset(self, at: tuple[Any, Any, Any, Any], k: Any, j: int) -> Any:
        batch, tile, _, column = at
        if self.op.constant:
            return (tile * self.op.k + k) * self.width + j * self.lanes
        batch = batch if self.op.b_batched else 0
        return (batch * self.op.k + k) * self.op.n + column + j * self.lanes

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
                value = apply(self.op.epilogue, acc[i * self.blocks + j], self.lanes, operands)
                store(self.y, place, value, self.lanes)


TEMPLATE = KernelTemplate(name="matmul", matches=matches, default=default, emit=emit, pack=pack)
