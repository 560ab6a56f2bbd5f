"""Transposed convolution over blocked layouts, one stride-1 convolution per output phase.

Outputs that share a position modulo the stride use the same taps at fixed shifts; no zeros are
inserted and no output is written twice. Weights are packed per phase
``[tile][ci block][tap][ci lane][blocks * lanes]``.
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
    splat,
    zero_border,
)
from edgepipe.kernels.conv import tile
from edgepipe.kernels.ops import ConvTransposeOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, ConvTransposeOp) else ""


def default(op: ConvTransposeOp, target: Target) -> Knobs:
    pixels, blocks = tile(target, op.y.blocks, max(1, op.y.w // op.strides[1]))
    return {"pixels": pixels, "blocks": blocks, "fused": target.arch in ("aarch64", "arm")}


def _phases(op: ConvTransposeOp) -> list[tuple[int, int, list[tuple[int, int, int, int]]]]:
    """``(phase y, phase x, [(tap y, tap x, shift y, shift x)])`` for every non-empty phase."""
    return [
        (py, px, [(ky, kx, dy, dx) for ky, dy in op.taps(0, py) for kx, dx in op.taps(1, px)])
        for py in range(min(op.strides[0], op.y.h))
        for px in range(min(op.strides[1], op.y.w))
    ]


def pack(op: ConvTransposeOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[ci, co, kh, kw]``, ``b[co]`` → one array over all phases and the padded bias."""
    weight, bias = arrays
    ci, co = weight.shape[:2]
    lanes, x_lanes, width = op.y.lanes, op.x.lanes, knobs["blocks"] * op.y.lanes
    grown = np.zeros((op.x.blocks * x_lanes, op.y.blocks * lanes, *op.kernel), np.float32)
    grown[:ci, :co] = weight
    parts = []
    for _, _, taps in _phases(op):
        if taps:
            chosen = np.stack([grown[:, :, ky, kx] for ky, kx, _, _ in taps])
            tiles = chosen.reshape(len(taps), op.x.blocks, x_lanes, -1, width)
            parts.append(tiles.transpose(3, 1, 0, 2, 4).reshape(-1))
    padded_bias = np.zeros(op.y.blocks * lanes, np.float32)
    padded_bias[:co] = bias
    return [np.concatenate(parts), padded_bias]


def emit(op: ConvTransposeOp, knobs: Knobs) -> Any:
    x, y, lanes, x_lanes = op.x, op.y, op.y.lanes, op.x.lanes
    blocks = knobs["blocks"]
    width, tiles = blocks * lanes, y.blocks // blocks
    fused, (sy, sx) = knobs["fused"], op.strides
    phases = _phases(op)
    sizes = [tiles * x.blocks * len(taps) * x_lanes * width for _, _, taps in phases]

    def body(*buffers: Any) -> None:
        source, weights, bias, *residuals, target = buffers

        def register_tile(phase: int, n: Any, t: Any, row: Any, start: Any, pixels: int) -> None:
            py, px, taps = phases[phase]
            first = sum(sizes[:phase])
            acc = Registers(pixels * blocks, lanes)
            for j in range(blocks):
                for i in range(pixels):
                    acc[i * blocks + j] = load(bias, (t * blocks + j) * lanes, lanes)
            with loop(x.blocks) as block:
                for number, (_, _, dy, dx) in enumerate(taps):
                    base = first + ((t * x.blocks + block) * len(taps) + number) * x_lanes * width
                    for lane in range(x_lanes):
                        for i in range(pixels):
                            scalar = source[x.offset(n, block, row + dy, start + i + dx) + lane]
                            for j in range(blocks):
                                w = load(weights, base + lane * width + j * lanes, lanes)
                                at = i * blocks + j
                                acc[at] = fma(splat(scalar, lanes), w, acc[at], lanes, fused)
            for i in range(pixels):
                out_y, out_x = row * sy + py, (start + i) * sx + px
                for j in range(blocks):
                    place = (n, t * blocks + j, out_y, out_x)
                    finish(op, residuals, target, place, acc[i * blocks + j])

        with loop(y.n) as n:
            for phase, (py, px, _) in enumerate(phases):
                rows, columns = -(-(y.h - py) // sy), -(-(y.w - px) // sx)
                pixels = min(knobs["pixels"], columns)
                with loop(tiles) as t, loop(rows) as row, loop(-(-columns // pixels)) as column:
                    start = minimum(column * pixels, columns - pixels)
                    register_tile(phase, n, t, row, start, pixels)
        zero_border(y, target)

    inputs = [
        ("x", x.elements, "float32"),
        ("w", sum(sizes), "float32"),
        ("b", y.blocks * lanes, "float32"),
    ]
    return kernel("conv_transpose", signature(op, inputs), body)


TEMPLATE = KernelTemplate(
    name="conv_transpose", matches=matches, default=default, emit=emit, pack=pack
)
