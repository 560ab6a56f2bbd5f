"""Depthwise convolution of codes: a thread computes four channels of neighbouring pixels of a row.

Each word of a row is read once for all taps of the thread; products are int32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import Registers, kernel, minimum
from edgepipe.kernels.cuda.qconv import finish, unfit
from edgepipe.kernels.cuda.threads import (
    THREADS,
    WARP,
    fill_border,
    launch,
    when,
    zeros,
)
from edgepipe.kernels.cuda.words import codes, held, width
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, vectors
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.weights import grown
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or not op.depthwise:
        return ""
    return unfit(op, target)


def default(op: QConvOp, target: Target) -> Knobs:
    lanes = width(op.x, op.y, *(r.layout for r in op.residuals))
    return {"columns": min(op.y.w, 2 if op.kernel[1] <= 3 else 4), "lanes": lanes}


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, kh, kw]``, ``b[c]``, ``m[c]`` → ``[kh][kw][c]`` and padded vectors."""
    channels = op.y.lanes * op.y.blocks
    taps = grown(arrays[0].transpose(1, 2, 3, 0), channels)
    return [np.ascontiguousarray(taps, np.int8), *vectors(op, arrays, channels)]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    channels, lanes, columns = op.y.lanes * op.y.blocks, knobs["lanes"], knobs["columns"]
    (kh, kw), (parts, per_row) = op.kernel, (channels // lanes, -(-op.y.w // columns))
    count = op.y.n * op.y.h * per_row * parts
    threads = min(THREADS, -(-count // WARP) * WARP)
    blocks = -(-count // threads)

    def body(*buffers: Any) -> None:
        with launch((blocks,), threads) as (block, _, _, thread):
            index = block * threads + thread
            with when(True if count % threads == 0 else index < count):
                part, rest = index % parts, index // parts
                first = minimum(rest % per_row * columns, op.y.w - columns)
                row, n = rest // per_row % op.y.h, rest // (per_row * op.y.h)
                _tile(op, knobs, buffers, (n, row, first), part * lanes)
            fill_border(op.y, buffers[-1], index, blocks * threads)

    buffers = arguments(op, (kh * kw * channels, "int8"), channels)
    return kernel("q_depthwise", buffers, body)


def _tile(op: QConvOp, knobs: Knobs, buffers: Sequence[Any], place: Any, channel: Any) -> None:
    """Neighbouring pixels of a row; the last tile of a row overlaps the one before it."""
    source, weights, bias, multipliers, *residuals, target = buffers
    (n, row, first), columns, lanes = place, knobs["columns"], knobs["lanes"]
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.strides, op.dilations
    channels = op.y.lanes * op.y.blocks
    sums, taps = zeros(columns * lanes, 1, "int32"), Registers(kw * lanes, 1, "int32")
    users: dict[int, list[tuple[int, int]]] = {}
    for i in range(columns):
        for kx in range(kw):
            users.setdefault(i * sx + kx * dx, []).append((i, kx))
    for ky in range(kh):
        for kx in range(kw):
            found = codes(weights, (ky * kw + kx) * channels + channel, lanes)
            for lane, code in enumerate(found):
                taps[kx * lanes + lane] = code
        for shift, uses in sorted(users.items()):
            in_y, in_x = row * sy + ky * dy - op.offset[0], first * sx + shift - op.offset[1]
            found = codes(source, op.x.offset(n, 0, in_y, in_x) + held(op.x, channel), lanes)
            for lane, code in enumerate(found):
                for i, kx in uses:
                    at = i * lanes + lane
                    sums[at] = sums[at] + code * taps[kx * lanes + lane]
    for i in range(columns):
        totals = [sums[i * lanes + lane] + bias[channel + lane] for lane in range(lanes)]
        finish(op, (multipliers, residuals, target), (n, row, first + i), channel, totals)


TEMPLATE = KernelTemplate(
    name="q_depthwise",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    rank=1,
    arithmetic="int8",
    accumulator="int32",
)
