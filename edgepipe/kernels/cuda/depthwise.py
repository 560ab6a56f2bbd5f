"""Depthwise convolution: a thread computes four channels of neighbouring pixels of a row.

Inputs come through the read-only cache, each vector of a row once for all taps of the thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import Registers, kernel, load, minimum
from edgepipe.kernels.cuda.threads import (
    LANES,
    THREADS,
    WARP,
    fill_border,
    finish,
    launch,
    read,
    when,
    zeros,
)
from edgepipe.kernels.cuda.weights import arguments, packed, row_values, scaled, unsupported
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.weights import grown
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.groups == 1:
        return ""
    if op.groups != op.x.c or op.y.c != op.x.c or op.x.lanes != LANES or op.y.lanes != LANES:
        return "not one filter per channel of NCHW4c"
    return unsupported(op.weights)


def default(op: ConvOp, target: Target) -> Knobs:
    return {"columns": min(op.y.w, 2 if op.kernel[1] <= 3 else 4)}


def knobs(op: ConvOp, target: Target) -> list[Knobs]:
    return [{"columns": columns} for columns in (1, 2, 3, 4, 6) if columns <= op.y.w]


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, kh, kw]``, scales, ``b[c]`` → ``[kh][kw][c]`` and padded vectors."""
    weight, *vectors = arrays
    channels = op.y.blocks * LANES
    taps = grown(weight.transpose(1, 2, 3, 0), channels)
    return [
        packed(op.weights, taps),
        *(grown(np.asarray(v, np.float32).reshape(-1), channels) for v in vectors),
    ]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    return emitted("depthwise", op, knobs["columns"], _sums)


def emitted(name: str, op: ConvOp, columns: int, sums_of: Callable[..., Registers]) -> Any:
    """The kernel ``name``, tiles of ``columns`` pixels; ``sums_of`` as ``_sums``."""
    x, y, (kh, kw) = op.x, op.y, op.kernel
    channels, per_row = y.blocks * LANES, -(-y.w // columns)
    count = y.n * y.blocks * y.h * per_row
    threads = min(THREADS, -(-count // WARP) * WARP)
    blocks = -(-count // threads)

    def tile(buffers: Sequence[Any], index: Any) -> None:
        source, *rest = buffers
        weights, (bias, *residuals, target) = rest[: op.weights.arrays], rest[op.weights.arrays :]
        part, row = index % per_row, index // per_row % y.h
        plane = index // (per_row * y.h)
        n, block = plane // y.blocks, plane % y.blocks
        # The last tile of a row overlaps its neighbour: the same values, stored twice.
        first = minimum(part * columns, y.w - columns)
        sums = sums_of(op, columns, source, weights[0], (n, block, row, first))
        for i in range(columns):
            value = scaled(op.weights, weights, block * LANES, sums[i])
            value = value + load(bias, block * LANES, LANES)
            finish(op, residuals, target, (n, block, row, first + i), value)

    def body(*buffers: Any) -> None:
        with launch((blocks,), threads) as (block, _, _, thread):
            index = block * threads + thread
            with when(True if count % threads == 0 else index < count):
                tile(buffers, index)
            fill_border(y, buffers[-1], index, blocks * threads)

    inputs = [
        ("x", x.elements, x.dtype),
        *arguments(op.weights, kh * kw * channels, channels),
        ("b", channels, "float32"),
    ]
    return kernel(name, signature(op, inputs), body)


def readers(op: ConvOp, columns: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Columns of the input from the first one on, and which pixels read each at which tap."""
    users: dict[int, list[tuple[int, int]]] = {}
    for i in range(columns):
        for kx in range(op.kernel[1]):
            users.setdefault(i * op.strides[1] + kx * op.dilations[1], []).append((i, kx))
    return sorted(users.items())


def input_offset(op: ConvOp, place: Sequence[Any], ky: int, shift: int) -> Any:
    """Where the vector of tap row ``ky`` lies, ``shift`` columns after the first of the pixel at
    ``place`` (n, block, row, column)."""
    n, block, row, first = place
    in_y = row * op.strides[0] + ky * op.dilations[0] - op.offset[0]
    return op.x.offset(n, block, in_y, first * op.strides[1] + shift - op.offset[1])


def _sums(
    op: ConvOp, columns: int, source: Any, taps: Any, place: tuple[Any, Any, Any, Any]
) -> Registers:
    """Four float32 sums of each of ``columns`` pixels from ``place`` (n, block, row, column) on."""
    (kh, kw), block = op.kernel, place[1]
    sums, vector, weight = zeros(columns, LANES), Registers(1, LANES), Registers(kw, LANES)
    reads = readers(op, columns)
    for ky in range(kh):
        for kx in range(kw):
            at = (ky * kw + kx) * op.y.blocks * LANES + block * LANES
            weight[kx] = row_values(taps, at)
        for shift, uses in reads:
            vector[0] = read(source, input_offset(op, place, ky, shift), LANES)
            for i, kx in uses:
                sums[i] = sums[i] + vector[0] * weight[kx]
    return sums


TEMPLATE = KernelTemplate(
    name="depthwise", matches=matches, default=default, emit=emit, pack=pack, knobs=knobs, rank=1
)
