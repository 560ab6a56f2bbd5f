"""Transposed convolution over blocked layouts, one stride-1 convolution per output phase.

Outputs that share a position modulo the stride use the same taps at fixed shifts; no zeros are
inserted and no output is written twice. Weights are packed per phase
``[tile][ci block][tap][ci lane][blocks * lanes]``; those with a scale per group
``[tile][tap][ci][blocks * lanes]``.
"""

from __future__ import annotations

import math
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
    parallel,
    splat,
    zero_border,
)
from edgepipe.kernels.conv_tile import tile
from edgepipe.kernels.ops import ConvTransposeOp, Op
from edgepipe.kernels.output import finish, signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.unpack import TileWeights, half_conversion
from edgepipe.kernels.weights import grouped, grown, store
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, ConvTransposeOp) else ""


def default(op: ConvTransposeOp, target: Target) -> Knobs:
    pixels, blocks = tile(target, op.y.blocks, max(1, op.y.w // op.strides[1]), op.weights)
    return {
        "pixels": pixels,
        "blocks": blocks,
        "fused": target.arch in ("aarch64", "arm"),
        "half": half_conversion(target),
    }


#: (tap y, tap x, shift y, shift x)
Tap = tuple[int, int, int, int]


def _phases(op: ConvTransposeOp) -> list[tuple[int, int, list[Tap]]]:
    """``(phase y, phase x, taps)`` for every phase with outputs; it may have no taps."""
    return [
        (py, px, [(ky, kx, dy, dx) for ky, dy in op.taps(0, py) for kx, dx in op.taps(1, px)])
        for py in range(min(op.strides[0], op.y.h))
        for px in range(min(op.strides[1], op.y.w))
    ]


def pack(op: ConvTransposeOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[ci, co, kh, kw]``, ``b[co]`` → one array over all phases and the padded bias.

    Codes come with their scales between the two: ``s[co]``, or ``s[groups, co, kh, kw]``.
    """
    weight, *scale, bias = arrays
    width, channels = knobs["blocks"] * op.y.lanes, op.y.blocks * op.y.lanes
    padded_bias = grown(np.asarray(bias, np.float32), channels)

    def taps_of(array: np.ndarray, taps: list[Tap]) -> np.ndarray:
        return grown(np.stack([array[:, :, ky, kx] for ky, kx, _, _ in taps]), channels)

    phases = [taps for _, _, taps in _phases(op) if taps]
    if op.weights.group:
        starts = range(0, channels, width)
        parts = [
            grouped(op.weights, taps_of(weight, t), taps_of(scale[0], t), starts, width)
            for t in phases
        ]
        rows, factors = (
            np.concatenate([part.reshape(-1, width) for part in same])
            for same in zip(*parts, strict=True)
        )
        return [store(op.weights, rows), factors, padded_bias]
    lanes_filled = np.zeros((op.x.blocks * op.x.lanes, *weight.shape[1:]), weight.dtype)
    lanes_filled[: len(weight)] = weight
    tiles = []
    for taps in phases:
        split = taps_of(lanes_filled, taps).reshape(len(taps), op.x.blocks, op.x.lanes, -1, width)
        tiles.append(split.transpose(3, 1, 0, 2, 4).reshape(-1, width))
    scales = [grown(np.asarray(s, np.float32), channels) for s in scale]
    return [store(op.weights, np.concatenate(tiles)), *scales, padded_bias]


def _rows(op: ConvTransposeOp, taps: list[Tap]) -> int:
    """Weight rows of a tile in a phase."""
    return len(taps) * (op.x.c if op.weights.group else op.x.blocks * op.x.lanes)


def _groups(op: ConvTransposeOp, taps: list[Tap]) -> int:
    """Scales of an output channel in a phase, where groups have their own."""
    return len(taps) * op.weights.groups(op.x.c) if op.weights.group else 0


def emit(op: ConvTransposeOp, knobs: Knobs) -> Any:
    tiles, channels = op.y.blocks // knobs["blocks"], op.y.blocks * op.y.lanes
    phases = [taps for _, _, taps in _phases(op)]
    rows = tiles * sum(_rows(op, taps) for taps in phases)
    factors = channels * (sum(_groups(op, taps) for taps in phases) or 1)
    inputs = [
        ("x", op.x.elements, "float32"),
        *op.weights.arguments(rows, knobs["blocks"] * op.y.lanes, factors),
        ("b", channels, "float32"),
    ]
    return kernel(
        "conv_transpose",
        signature(op, inputs),
        lambda *buffers: _Emission(op, knobs, buffers).run(),
    )


class _Emission:
    """One kernel being emitted: phase by phase, the loops around a register tile, and the tile."""

    def __init__(self, op: ConvTransposeOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs, self.blocks = op, knobs, knobs["blocks"]
        self.tiles = op.y.blocks // self.blocks
        self.source, *rest = buffers
        packed, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
        shape = (self.blocks, op.y.lanes)
        self.weights = TileWeights(op.weights, packed, shape, knobs["half"], knobs["fused"])
        self.bias, *self.residuals, self.target = rest
        #: Where the current phase begins: weight rows, rows of factors.
        self.first_row = self.first_factor = 0

    def run(self) -> None:
        (sy, sx), y = self.op.strides, self.op.y
        with parallel(y.n) as n:
            for py, px, taps in _phases(self.op):
                rows, columns = -(-(y.h - py) // sy), -(-(y.w - px) // sx)
                pixels = min(self.knobs["pixels"], columns)
                with (
                    parallel(self.tiles) as t,
                    parallel(rows) as row,
                    parallel(-(-columns // pixels)) as column,
                ):
                    start = minimum(column * pixels, columns - pixels)
                    self.register_tile((n, t, row, start), (py, px), taps, pixels)
                self.first_row += self.tiles * _rows(self.op, taps)
                self.first_factor += self.tiles * _groups(self.op, taps)
        zero_border(y, self.target)

    def register_tile(
        self, at: tuple[Any, ...], phase: tuple[int, int], taps: list[Tap], pixels: int
    ) -> None:
        """Accumulate ``pixels`` x ``blocks`` output vectors of a phase, then apply the epilogue."""
        (n, t, row, start), lanes, (sy, sx) = at, self.op.y.lanes, self.op.strides
        acc = Registers(pixels * self.blocks, lanes)
        for j in range(self.blocks):
            for i in range(pixels):
                acc[i * self.blocks + j] = self.weights.start(self.bias_vector(t, j))
        if self.op.weights.group:
            self.accumulate_groups(acc, at, taps)
        else:
            self.accumulate(acc, at, taps)
        for i in range(pixels):
            out_y, out_x = row * sy + phase[0], (start + i) * sx + phase[1]
            for j in range(self.blocks):
                block, value = t * self.blocks + j, acc[i * self.blocks + j]
                value = self.weights.finished(value, block * lanes, self.bias_vector(t, j))
                finish(self.op, self.residuals, self.target, (n, block, out_y, out_x), value)

    def bias_vector(self, tile: Any, j: int) -> Any:
        return load(self.bias, (tile * self.blocks + j) * self.op.y.lanes, self.op.y.lanes)

    def accumulate(self, acc: Registers, at: tuple[Any, ...], taps: list[Tap]) -> None:
        """Sum over input channels and the taps of the phase."""
        x = self.op.x
        with loop(x.blocks) as block:
            for number, tap in enumerate(taps):
                first = self.first_row + ((at[1] * x.blocks + block) * len(taps) + number) * x.lanes
                for lane in range(x.lanes):
                    self.multiply_add(acc, at, tap, (block, lane), (first, lane))

    def accumulate_groups(self, acc: Registers, at: tuple[Any, ...], taps: list[Tap]) -> None:
        """The same sum with a scale per tap and group."""
        x, weights, t = self.op.x, self.op.weights, at[1]
        for number, tap in enumerate(taps):
            row = self.first_row + (t * len(taps) + number) * x.c
            factor = self.first_factor + (t * len(taps) + number) * weights.groups(x.c)
            for run in weights.runs(x.c):
                step = math.gcd(run.size, x.lanes)
                with loop(run.groups) as g:
                    with loop(run.size // step) as part:
                        c = run.channel + g * run.size + part * step
                        for lane in range(step):
                            where = (c // x.lanes, c % x.lanes + lane)
                            self.multiply_add(acc, at, tap, where, (row + c, lane))
                    self.weights.end_group(acc, factor + run.group + g)

    def multiply_add(
        self,
        acc: Registers,
        at: tuple[Any, ...],
        tap: Tap,
        where: tuple[Any, Any],
        number: tuple[Any, int],
    ) -> None:
        """Input channel ``where`` (block, lane) of every pixel times row ``number`` (two parts)."""
        (n, _, row, start), (_, _, dy, dx), lanes = at, tap, self.op.y.lanes
        weights = self.weights.row(*number)
        for i in range(acc.count // self.blocks):
            scalar = self.source[self.op.x.offset(n, where[0], row + dy, start + i + dx) + where[1]]
            for j in range(self.blocks):
                r = i * self.blocks + j
                acc[r] = fma(splat(scalar, lanes), weights[j], acc[r], lanes, self.knobs["fused"])


TEMPLATE = KernelTemplate(
    name="conv_transpose", matches=matches, default=default, emit=emit, pack=pack
)
