"""Depthwise convolution of codes with three rows of taps by dot products of four bytes: SDOT,
VPDPBUSD, or VPMADDUBSW and VPMADDWD.

A dot product adds up four neighbouring bytes of one channel; in NHWC these are four channels. So
four rows of the input are interleaved first, ``[channel][row]``, once per input column. They serve
two rows of the output and every pixel whose kernel covers that column: one instruction takes a
whole column of taps for four channels (eight, sixteen), which are packed as ``w0 w1 w2 0`` for the
upper row and as ``0 w0 w1 w2`` for the lower one.
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

#: Channels at a time, of which a dot product has 4, 8 or all; output rows; input rows.
_LANES, _DOWN, _ROWS = 16, 2, 4


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or not op.depthwise:
        return ""
    if target.integer.dot not in ("sdot", "maddubs", "vnni"):
        return ""
    if target.integer.dot == "maddubs" and op.limit > target.integer.weight_limit:
        return "sums of two products of its weights do not fit int16"
    # Strided ones serve one row of the output only: 1 % slower than plain sums in MobileNetV1.
    if op.kernel[0] != 3 or op.strides != (1, 1) or op.dilations != (1, 1) or op.y.h < _DOWN:
        return "its kernel has not three rows, is strided or dilated, or gives one row"
    if op.x.blocks > 1 or op.x.lanes % _LANES:
        return "its input is not in NHWC with channels in sixteens"
    lanes = dot.choose(target, op.limit, op.x.lanes).lanes
    if op.y.dtype == "float32" and op.y.lanes % lanes:
        return f"its float output has vectors of fewer than {lanes} channels"
    return None


def default(op: QConvOp, target: Target) -> Knobs:
    chosen = dot.choose(target, op.limit, op.x.lanes)
    columns = 4 if chosen.lanes == _LANES else 2
    return {
        "columns": min(columns, op.y.w),
        "dot": chosen.name,
        "lanes": chosen.lanes,
        "signed": chosen.signed,
        "arch": target.arch,
        # Whether interleaved columns stay in registers for the next pixels.
        "kept": target.arch == "aarch64",
    }


def settings(op: QConvOp, target: Target) -> list[Knobs]:
    """Other numbers of pixels at a time."""
    return [{**default(op, target), "columns": n} for n in range(1, min(op.y.w, 4) + 1)]


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, 3, kw]``, ``b[c]``, ``m[c]`` → ``[chunk][part][kw][down][channel][row]`` …"""
    weight = arrays[0]
    c, _, kh, kw = weight.shape
    channels = op.x.lanes
    grown = np.zeros((channels, kw, _DOWN, _ROWS), np.int8)
    for down in range(_DOWN):
        grown[:c, :, down, down : down + kh] = weight[:, 0].transpose(0, 2, 1)
    lanes = knobs["lanes"]
    parts = grown.reshape(channels // lanes, lanes, kw, _DOWN, _ROWS)
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
        self.columns, self.kept = knobs["columns"], knobs["kept"]
        self.dot = dot.named(knobs["dot"], knobs["lanes"], knobs["signed"])
        self.parts = _LANES // self.dot.lanes
        #: Columns of the input that a tile has, and those it shares with the next one.
        self.shared = op.kernel[1] - 1
        self.across = self.columns + self.shared

    def run(self) -> None:
        y = self.op.y
        chunks, downs = self.op.x.lanes // _LANES, -(-y.h // _DOWN)
        with parallel(y.n) as n, parallel(chunks) as chunk, parallel(downs) as down:
            # The last tiles are moved back over their neighbours.
            row = minimum(down * _DOWN, y.h - _DOWN)
            if self.kept:
                self.output_row(n, chunk, row)
            else:
                with loop(-(-y.w // self.columns)) as tile:
                    column = minimum(tile * self.columns, y.w - self.columns)
                    self.output_tile(self.window(), (n, chunk, row, column))
        zero_border(y, self.target)

    def output_row(self, n: Any, chunk: Any, row: Any) -> None:
        """Tiles from left to right; each takes over the columns it shares with the last one."""
        width, window = self.op.y.w, self.window()
        before = range(self.columns, self.across)
        self.interleave(window, (n, chunk, row, -self.columns), before)
        with loop(width // self.columns) as tile:
            for i in range(self.shared * self.parts):
                window[i] = window[self.columns * self.parts + i]
            self.output_tile(window, (n, chunk, row, tile * self.columns), self.shared)
        if width % self.columns:
            self.output_tile(window, (n, chunk, row, width - self.columns))

    def window(self) -> Registers:
        """``[input column][part]``, each with four rows of a dot product's channels."""
        return Registers(self.across * self.parts, self.dot.lanes * _ROWS, "int8")

    def output_tile(self, window: Registers, at: Any, known: int = 0) -> None:
        """Two rows of ``columns`` pixels; ``known`` columns of their inputs are there."""
        n, chunk, row, column = at
        kw, lanes = self.op.kernel[1], self.dot.lanes
        self.interleave(window, at, range(known, self.across))
        pixels = [(down, i) for down in range(_DOWN) for i in range(self.columns)]
        size = lanes * _ROWS
        acc = Registers(len(pixels) * self.parts, lanes, "int32")
        for part in range(self.parts):
            first = load(self.bias, chunk * _LANES + part * lanes, lanes)
            for p in range(len(pixels)):
                acc[p * self.parts + part] = first
            for kx in range(kw):
                number = ((chunk * self.parts + part) * kw + kx) * _DOWN
                weights = [load(self.weights, (number + d) * size, size) for d in range(_DOWN)]
                for p, (down, i) in enumerate(pixels):
                    r = p * self.parts + part
                    x = window[(i + kx) * self.parts + part]
                    acc[r] = self.dot.accumulate(acc[r], x, weights[down])
        for p, (down, i) in enumerate(pixels):
            sums = [acc[p * self.parts + part] for part in range(self.parts)]
            self.store(sums, (n, row + down, column + i), chunk * _LANES)

    def interleave(self, window: Registers, at: Any, columns: Sequence[int]) -> None:
        """Load the rows of ``columns`` of the inputs of a tile."""
        n, chunk, row, column = at
        x, offset = self.op.x, self.op.offset
        for i in columns:
            places = [
                x.offset(n, 0, row + ky - offset[0], column + i - offset[1]) for ky in range(_ROWS)
            ]
            rows = [load(self.source, place + chunk * _LANES, _LANES) for place in places]
            for part, value in enumerate(_interleave(rows, self.parts)):
                window[i * self.parts + part] = value

    def store(self, totals: Sequence[Any], place: Any, channel: Any) -> None:
        op, lanes = self.op, self.dot.lanes
        sums = [
            finished(op, total, self.multipliers, self.rest, place, channel + part * lanes, lanes)
            for part, total in enumerate(totals)
        ]
        put(self.target, op.y, place, channel, sums, op.limits, self.arch, lanes)


def _interleave(rows: Sequence[Any], parts: int) -> list[Any]:
    """Four int8x16 as their bytes in turn, in ``parts`` vectors."""
    pairs = [dot.reinterpret("int16x8", v) for a in (0, 2) for v in _zip(rows[a], rows[a + 1], 16)]
    low, high = _zip(pairs[0], pairs[2], 8), _zip(pairs[1], pairs[3], 8)
    quads = [dot.reinterpret("int8x16", value) for value in (*low, *high)]
    each = len(quads) // parts
    return [dot.joined(quads[i : i + each], 16) for i in range(0, len(quads), each)]


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
    version=3,
    arithmetic="int8",
    accumulator="int32",
)
