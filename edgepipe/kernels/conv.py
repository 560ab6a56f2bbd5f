"""Direct convolution over blocked layouts, pointwise included.

A register tile of ``pixels`` x ``blocks * lanes`` output channels accumulates over input
channels and taps. Weights are packed ``[tile][ci block][kh][kw][ci lane][blocks * lanes]``, so the
inner loop streams them; the input needs no im2col because its border is already in the buffer.
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
    operand_offset,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Weights up to this many bytes stay in the first-level cache while pixels stream past.
_SMALL_WEIGHTS = 24 * 1024


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp):
        return ""
    lanes = op.y.lanes
    if op.groups > 1:
        if op.x.lanes != lanes:
            return "grouped convolution needs a blocked input"
        if (op.x.c // op.groups) % lanes or (op.y.c // op.groups) % lanes:
            return f"channels per group are not a multiple of {lanes}"
    return None


def tile(target: Target, blocks: int, pixels: int) -> tuple[int, int]:
    """Register tile ``(pixels, channel blocks)`` that fits the target's vector registers.

    Sizes are those measured to reach 89-97 % of a core's peak: enough accumulators to hide the
    multiply-add latency, few enough that none spills.
    """
    if target.kind == "wasm":  # V8: 16 registers, and beyond 8 accumulators it spills
        choices = [(4, 2), (8, 1)]
    elif target.simd.registers == 32 and target.simd.lanes_f32 == 16:
        choices = [(7, 2), (14, 2), (14, 1), (7, 1)]
    elif target.simd.registers == 32:
        choices = [(6, 4), (8, 3), (12, 2), (16, 1)]
    else:
        choices = [(6, 2), (4, 3), (12, 1)]
    fitting = [c for c in choices if blocks % c[1] == 0]

    def waste(choice: tuple[int, int]) -> float:
        done = -(-pixels // choice[0]) * choice[0]
        return done / pixels

    best = min(fitting, key=lambda c: (round(waste(c), 2), choices.index(c)))
    return min(best[0], pixels), best[1]


def default(op: ConvOp, target: Target) -> Knobs:
    flat = (
        op.kernel == (1, 1)
        and op.strides == (1, 1)
        and not op.x.padded
        and not any(r.padded for r in op.residuals)
    )
    blocks_per_group = op.y.blocks // op.groups
    pixels, blocks = tile(target, blocks_per_group, op.y.h * op.y.w if flat else op.y.w)
    weight_bytes = 4 * op.y.c * op.x.c // op.groups * op.kernel[0] * op.kernel[1]
    return {
        "pixels": pixels,
        "blocks": blocks,
        "flat": flat,
        "outer": "pixels" if weight_bytes <= _SMALL_WEIGHTS else "channels",
        # By-element multiply-add wants the scalar operand in a vector register.
        "by_element": target.arch in ("aarch64", "arm") and op.x.lanes == 4,
        "fused": target.simd.fma and target.arch in ("aarch64", "arm"),
    }


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]``, ``b[co]`` → packed weights and a bias padded to whole blocks."""
    weight, bias = arrays
    co, ci, kh, kw = weight.shape
    lanes, x_lanes, blocks = op.y.lanes, op.x.lanes, knobs["blocks"]
    ci_blocks = -(-ci // x_lanes)
    grown = np.zeros((op.y.blocks * lanes, ci_blocks * x_lanes, kh, kw), np.float32)
    grown[:co, :ci] = weight
    tiles = grown.reshape(-1, blocks * lanes, ci_blocks, x_lanes, kh, kw)
    packed = np.ascontiguousarray(tiles.transpose(0, 2, 4, 5, 3, 1))
    padded_bias = np.zeros(op.y.blocks * lanes, np.float32)
    padded_bias[:co] = bias
    return [packed, padded_bias]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    x, y, lanes, x_lanes = op.x, op.y, op.y.lanes, op.x.lanes
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.strides, op.dilations
    pixels, blocks, flat = knobs["pixels"], knobs["blocks"], knobs["flat"]
    ci_blocks = -(-(x.c // op.groups) // x_lanes)
    tiles = y.blocks // blocks
    tiles_per_group = tiles // op.groups
    width = blocks * lanes
    columns = y.h * y.w if flat else y.w
    column_tiles = -(-columns // pixels)

    def body(*buffers: Any) -> None:
        source, weights, bias, *residuals, target = buffers

        def register_tile(n: Any, tile: Any, row: Any, column_tile: Any) -> None:
            start = column_tile * pixels
            if columns % pixels:  # the last tile overlaps its neighbour: same values, stored twice
                start = minimum(start, columns - pixels)

            def place(i: int) -> tuple[Any, Any]:
                at = start + i
                return (at // y.w, at % y.w) if flat else (row, at)

            first_block = 0
            if op.groups > 1:
                first_block = tile // tiles_per_group * ci_blocks
            acc = Registers(pixels * blocks, lanes)
            for j in range(blocks):
                value = load(bias, (tile * blocks + j) * lanes, lanes)
                for i in range(pixels):
                    acc[i * blocks + j] = value

            def input_at(block: Any, i: int, ky: Any, kx: Any) -> Any:
                block = first_block + block
                if flat:
                    return ((n * x.blocks + block) * (x.h * x.w) + start + i) * x_lanes
                return x.offset(
                    n,
                    block,
                    row * sy + ky * dy - op.offset[0],
                    (start + i) * sx + kx * dx - op.offset[1],
                )

            def taps(block: Any, ky: Any, kx: Any) -> None:
                base = (((tile * ci_blocks + block) * kh + ky) * kw + kx) * x_lanes * width
                if knobs["by_element"]:
                    inputs = Registers(pixels, x_lanes)
                    for i in range(pixels):
                        inputs[i] = load(source, input_at(block, i, ky, kx), x_lanes)
                for lane in range(x_lanes):
                    for i in range(pixels):
                        if knobs["by_element"]:
                            scalar = inputs.lane(i, lane)
                        else:
                            scalar = source[input_at(block, i, ky, kx) + lane]
                        for j in range(blocks):
                            weight = load(weights, base + lane * width + j * lanes, lanes)
                            at = i * blocks + j
                            acc[at] = fma(
                                splat(scalar, lanes), weight, acc[at], lanes, knobs["fused"]
                            )

            if x_lanes == 1 and kh * kw <= 9 and ci_blocks > 1:
                with loop(ci_blocks) as block:
                    for ky in range(kh):
                        for kx in range(kw):
                            taps(block, ky, kx)
            else:
                with loop(ci_blocks) as block, loop(kh) as ky, loop(kw) as kx:
                    taps(block, ky, kx)

            for i in range(pixels):
                row_i, column = place(i)
                for j in range(blocks):
                    block = tile * blocks + j
                    operands = [
                        load(buffer, operand_offset(layout, n, block, row_i, column), lanes)
                        for buffer, layout in zip(residuals, op.residuals, strict=True)
                    ]
                    value = apply(op.epilogue, acc[i * blocks + j], lanes, operands)
                    store(target, y.offset(n, block, row_i, column), value, lanes)

        with loop(y.n) as n:
            if knobs["outer"] == "pixels":
                with loop(1 if flat else y.h) as row, loop(column_tiles) as t, loop(tiles) as tile:
                    register_tile(n, tile, row, t)
            else:
                with loop(tiles) as tile, loop(1 if flat else y.h) as row, loop(column_tiles) as t:
                    register_tile(n, tile, row, t)
        zero_border(y, target)

    packed = tiles * ci_blocks * kh * kw * x_lanes * width
    arguments = [("x", x.elements, "float32"), ("w", packed, "float32")]
    arguments.append(("b", y.blocks * lanes, "float32"))
    arguments += [(f"r{i}", r.elements, "float32") for i, r in enumerate(op.residuals)]
    arguments.append(("y", y.elements, "float32"))
    kind = "pointwise" if op.kernel == (1, 1) else "conv"
    return kernel(kind, arguments, body)


TEMPLATE = KernelTemplate(
    name="conv", matches=matches, default=default, emit=emit, pack=pack, rank=1
)
