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
    lanes, rows, blocks = knobs["lanes"], knobs["rows"], knobs["blocks"]
    width = lanes * blocks
    tiles = -(-op.n // width)
    unroll = knobs["unroll"]

    def body(*buffers: Any) -> None:
        a, b, *rest, y = buffers
        bias = rest.pop(0) if op.bias else None

        def register_tile(batch: Any, tile: Any, row_tile: Any) -> None:
            row = minimum(row_tile * rows, op.m - rows)
            column = minimum(tile * width, op.n - width)
            acc = Registers(rows * blocks, lanes)
            for j in range(blocks):
                start = splat(float32(0), lanes)
                if bias is not None:
                    start = load(bias, column + j * lanes, lanes)
                for i in range(rows):
                    acc[i * blocks + j] = start

            def a_at(i: int, k: Any) -> Any:
                return ((batch if op.a_batched else 0) * op.m + row + i) * op.k + k

            def b_at(k: Any, j: int) -> Any:
                if op.constant:
                    return (tile * op.k + k) * width + j * lanes
                return ((batch if op.b_batched else 0) * op.k + k) * op.n + column + j * lanes

            def step(k: Any, count: int) -> None:
                if knobs["by_element"] and count == lanes:
                    inputs = Registers(rows, lanes)
                    for i in range(rows):
                        inputs[i] = load(a, a_at(i, k), lanes)
                by_element = knobs["by_element"] and count == lanes
                places = [(i, j) for i in range(rows) for j in range(blocks)]
                if by_element:  # one weight at a time, see the convolution
                    places.sort(key=lambda place: place[1])
                for u in range(count):
                    for i, j in places:
                        scalar = inputs.lane(i, u) if by_element else a[a_at(i, k + u)]
                        weight = load(b, b_at(k + u, j), lanes)
                        at = i * blocks + j
                        acc[at] = fma(splat(scalar, lanes), weight, acc[at], lanes, knobs["fused"])

            with loop(op.k // unroll) as k:
                step(k * unroll, unroll)
            if op.k % unroll:
                step(op.k - op.k % unroll, op.k % unroll)

            for i in range(rows):
                for j in range(blocks):
                    at = column + j * lanes
                    place = (batch * op.m + row + i) * op.n + at
                    operands = [
                        load(buffer, place if kind == "full" else at, lanes)
                        for buffer, kind in zip(rest, op.residuals, strict=True)
                    ]
                    value = apply(op.epilogue, acc[i * blocks + j], lanes, operands)
                    store(y, place, value, lanes)

        with loop(op.batch) as batch, loop(tiles) as tile, loop(-(-op.m // rows)) as row_tile:
            register_tile(batch, tile, row_tile)

    b_elements = tiles * op.k * width
    if not op.constant:
        b_elements = (op.batch if op.b_batched else 1) * op.k * op.n
    arguments = [("a", (op.batch if op.a_batched else 1) * op.m * op.k, "float32")]
    arguments.append(("b", b_elements, "float32"))
    if op.bias:
        arguments.append(("bias", op.n, "float32"))
    sizes = {"full": op.batch * op.m * op.n, "row": op.n}
    arguments += [(f"r{i}", sizes[kind], "float32") for i, kind in enumerate(op.residuals)]
    arguments.append(("y", op.batch * op.m * op.n, "float32"))
    return kernel("dense" if op.constant else "matmul", arguments, body)


TEMPLATE = KernelTemplate(name="matmul", matches=matches, default=default, emit=emit, pack=pack)
