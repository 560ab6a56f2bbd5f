"""Depthwise convolution of codes with three rows of taps by dot products of four bytes (SDOT).

A dot product adds up four neighbouring bytes of one channel; in NHWC these are four channels. So
four rows of the input are interleaved first, ``[channel][row]``, once per input column. They serve
two rows of the output and every pixel whose kernel covers that column: one instruction takes a
whole column of taps for four channels, which are packed as ``w0 w1 w2 0`` for the upper row and as
``0 w0 w1 w2`` for the lower one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, kernel, load, loop, minimum, parallel, zero_border
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, finished, vectors
from edgepipe.kernels.requantize import put
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Channels at a time, quarters of which a dot product has; output rows; input rows.
_LANES, _QUADS, _DOWN, _ROWS = 16, 4, 2, 4


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or not op.depthwise or target.integer.dot != "sdot":
        return ""
    if op.kernel[0] != 3 or op.strides != (1, 1) or op.dilations != (1, 1) or op.y.h < _DOWN:
        return "its kernel has not three rows, is strided or dilated, or gives one row"
    if op.x.blocks > 1 or op.x.lanes % _LANES:
        return "its input is not in NHWC with channels in sixteens"
    if op.y.dtype == "float32" and op.y.lanes % _QUADS:
        return "its float output has vectors of fewer than 4 channels"
    return None


def default(op: QConvOp, target: Target) -> Knobs:
    return {"columns": min(2, op.y.w), "arch": target.arch}


def settings(op: QConvOp, target: Target) -> list[Knobs]:
    """Other numbers of pixels at a time."""
    return [{**default(op, target), "columns": n} for n in range(1, min(op.y.w, 4) + 1)]


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, 3, kw]``, ``b[c]``, ``m[c]`` → ``[chunk][quad][kw][down][channel][row]`` …"""
    weight = arrays[0]
    c, _, kh, kw = weight.shape
    channels = op.x.lanes
    grown = np.zeros((channels, kw, _DOWN, _ROWS), np.int8)
    for down in range(_DOWN):
        grown[:c, :, down, down : down + kh] = weight[:, 0].transpose(0, 2, 1)
    parts = grown.reshape(channels // _QUADS, _LANES // _QUADS, kw, _DOWN, _ROWS)
    return [np.ascontiguousarray(parts.transpose(0, 2, 3, 1, 4)), *vectors(op, arrays, channels)]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    channels = op.x.lanes
    size = channels * op.kernel[1] * _DOWN * _ROWS
    buffers = arguments(op, (size, "int8"), channels)
    return kernel("q_depthwise", buffers, lambda *held: _Emission(op, knobs, held).run())


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.arch = op, knobs["arch"]
        self.source, self.weights, self.bias, self.multipliers, *self.rest = buffers
        self.target = self.rest.pop()
        self.columns = knobs["columns"]
        self.dot = dot.named("sdot", _LANES // _QUADS, True)

    def run(self) -> None:
        y = self.op.y
        chunks, downs = self.op.x.lanes // _LANES, -(-y.h // _DOWN)
        with (
            parallel(y.n) as n,
            parallel(chunks) as chunk,
            parallel(downs) as down,
            loop(-(-y.w // self.columns)) as tile,
        ):
            # The last tiles are moved back over their neighbours.
            row = minimum(down * _DOWN, y.h - _DOWN)
            column = minimum(tile * self.columns, y.w - self.columns)
            self.output_tile(n, chunk, row, column)
        zero_border(y, self.target)

    def output_tile(self, n: Any, chunk: Any, row: Any, column: Any) -> None:
        kw, lanes = self.op.kernel[1], self.dot.lanes
        inputs = self.interleaved(n, chunk, row, column)
        pixels = [(down, i) for down in range(_DOWN) for i in range(self.columns)]
        acc = Registers(len(pixels) * _QUADS, lanes, "int32")
        for quad in range(_QUADS):
            first = load(self.bias, chunk * _LANES + quad * lanes, lanes)
            for p in range(len(pixels)):
                acc[p * _QUADS + quad] = first
            for kx in range(kw):
                number = ((chunk * _QUADS + quad) * kw + kx) * _DOWN
                weights = [load(self.weights, (number + d) * _LANES, _LANES) for d in range(_DOWN)]
                for p, (down, i) in enumerate(pixels):
                    r = p * _QUADS + quad
                    x = inputs[(i + kx) * _QUADS + quad]
                    acc[r] = self.dot.accumulate(acc[r], x, weights[down])
        for p, (down, i) in enumerate(pixels):
            sums = [acc[p * _QUADS + quad] for quad in range(_QUADS)]
            self.store(sums, (n, row + down, column + i), chunk * _LANES)

    def interleaved(self, n: Any, chunk: Any, row: Any, column: Any) -> Registers:
        """``[input column][quad]``, each with four rows of four channels."""
        op = self.op
        count = self.columns - 1 + op.kernel[1]
        inputs = Registers(count * _QUADS, _LANES, "int8")
        for i in range(count):
            at = [
                op.x.offset(n, 0, row + ky - op.offset[0], column + i - op.offset[1])
                for ky in range(_ROWS)
            ]
            rows = [load(self.source, place + chunk * _LANES, _LANES) for place in at]
            for quad, value in enumerate(_interleave(rows)):
                inputs[i * _QUADS + quad] = value
        return inputs

    def store(self, totals: Sequence[Any], place: Any, channel: Any) -> None:
        op, lanes = self.op, self.dot.lanes
        sums = [
            finished(op, total, self.multipliers, self.rest, place, channel + quad * lanes, lanes)
            for quad, total in enumerate(totals)
        ]
        put(self.target, op.y, place, channel, sums, op.limits, self.arch, lanes)


def _interleave(rows: Sequence[Any]) -> list[Any]:
    """Four int8x16 as their bytes in turn."""
    pairs = [dot.reinterpret("int16x8", v) for a in (0, 2) for v in _zip(rows[a], rows[a + 1], 16)]
    low, high = _zip(pairs[0], pairs[2], 8), _zip(pairs[1], pairs[3], 8)
    return [dot.reinterpret("int8x16", value) for value in (*low, *high)]


def _zip(a: Any, b: Any, lanes: int) -> list[Any]:
    """Elements of two vectors in turn: those of the lower halves, those of the upper ones."""
    return [
        tirx.Shuffle([a, b], [lane + side for lane in half for side in (0, lanes)])
        for half in (range(lanes // 2), range(lanes // 2, lanes))
    ]


TEMPLATE = KernelTemplate(
    name="q_depthwise_dot",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    rank=3,
    arithmetic="int8",
    accumulator="int32",
)
