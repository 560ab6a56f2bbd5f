"""Depthwise convolution of codes with three rows of taps by dot products of four bytes: SDOT,
VPDPBUSD, or VPMADDUBSW and VPMADDWD.

A dot product adds up four neighbouring bytes of one channel; in NHWC these are four channels. So
four rows of the input are interleaved first, ``[channel][row]``, once per input column. They serve
two rows of the output and every pixel whose kernel covers that column: one instruction takes a
whole column of taps for four channels (eight, sixteen), which are packed as ``w0 w1 w2 0`` for the
upper row and as ``0 w0 w1 w2`` for the lower one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, kernel, load, loop, minimum, parallel, zero_border
from edgepipe.kernels.dot import joined, reinterpret
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, finished, vectors
from edgepipe.kernels.requantize import put
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.turning import interleaved
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
    return kernel("q_depthwise", buffers, lambda *held: DotEmission(op, knobs, held).run())


class DotEmission:
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.arch = op, knobs["arch"]
        self.source, self.weights, self.bias, self.multipliers, *self.rest = buffers
        self.target = self.rest.pop()
        self.columns, self.kept = knobs["columns"], knobs.get("kept")
        self.dot = dot.named(knobs["dot"], knobs["lanes"], knobs["signed"])
        self.parts = _LANES // self.dot.lanes
        #: Rows of the output at a time.
        self.down = _DOWN if op.strides[0] == 1 and op.y.h >= _DOWN else 1
        #: Columns of the input that a tile has, and those it shares with the next one.
        self.shared = op.kernel[1] - 1
        self.across = (self.columns - 1) * op.strides[1] + op.kernel[1]

    def run(self) -> None:
        y, shared = self.op.y, parallel
        chunks, downs = self.op.x.lanes // _LANES, -(-y.h // self.down)
        with parallel(y.n) as n, parallel(chunks) as chunk:
            if self.prepare(chunk):  # for all rows of these channels
                shared = loop
            with shared(downs) as down:
                # The last tiles are moved back over their neighbours.
                row = minimum(down * self.down, y.h - self.down)
                if self.kept:
                    self.output_row(n, chunk, row)
                else:
                    with loop(-(-y.w // self.columns)) as tile:
                        column = minimum(tile * self.columns, y.w - self.columns)
                        self.output_tile(self.window(), (n, chunk, row, column))
        zero_border(y, self.target)

    def prepare(self, chunk: Any) -> bool:
        """What is worth doing once for the channels of a chunk: nothing here."""
        del chunk
        return False

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
        lanes, stride = self.dot.lanes, self.op.strides[1]
        self.interleave(window, at, range(known, self.across))
        pixels = [(down, i) for down in range(self.down) for i in range(self.columns)]
        acc = Registers(len(pixels) * self.parts, lanes, "int32")
        for part in range(self.parts):
            first = self.first(chunk, part)
            for p in range(len(pixels)):
                acc[p * self.parts + part] = first
            for kx in range(self.op.kernel[1]):
                multiply = self.products(chunk, part, kx)
                for p, (down, i) in enumerate(pixels):
                    r = p * self.parts + part
                    x = window[(i * stride + kx) * self.parts + part]
                    acc[r] = multiply(acc[r], x, down)
        for p, (down, i) in enumerate(pixels):
            sums = [acc[p * self.parts + part] for part in range(self.parts)]
            self.store(sums, (n, row + down, column + i), chunk * _LANES)

    def first(self, chunk: Any, part: int) -> Any:
        """What the sums of one part of the channels begin with."""
        return load(self.bias, chunk * _LANES + part * self.dot.lanes, self.dot.lanes)

    def products(self, chunk: Any, part: int, kx: int) -> Callable[[Any, Any, int], Any]:
        """Adds to a sum the products of a column of inputs and the weights of column ``kx``, for
        the upper (0) or lower (1) row of the output."""
        size = self.dot.lanes * _ROWS
        number = ((chunk * self.parts + part) * self.op.kernel[1] + kx) * _DOWN
        weights = [load(self.weights, (number + d) * size, size) for d in range(_DOWN)]
        return lambda acc, x, down: self.dot.accumulate(acc, x, weights[down])

    def interleave(self, window: Registers, at: Any, columns: Sequence[int]) -> None:
        """Load the rows of ``columns`` of the inputs of a tile."""
        n, chunk, row, column = at
        x, offset, (down, right) = self.op.x, self.op.offset, self.op.strides
        last = self.op.kernel[0] + self.down - 2  # weights of what comes after it are zero
        for i in columns:
            places = [
                x.offset(
                    n, 0, row * down + min(ky, last) - offset[0], column * right + i - offset[1]
                )
                for ky in range(_ROWS)
            ]
            rows = [load(self.source, place + chunk * _LANES, _LANES) for place in places]
            for part, value in enumerate(self.interleaved(rows)):
                window[i * self.parts + part] = value

    def interleaved(self, rows: Sequence[Any]) -> list[Any]:
        """Four int8x16 as their bytes in turn, a vector for every part of the channels."""
        words = [reinterpret("int8x16", word) for word in interleaved(rows)]
        each = len(words) // self.parts
        return [joined(words[i : i + each], 16) for i in range(0, len(words), each)]

    def store(self, totals: Sequence[Any], place: Any, channel: Any) -> None:
        op, lanes = self.op, self.dot.lanes
        sums = [
            finished(op, total, self.multipliers, self.rest, place, channel + part * lanes, lanes)
            for part, total in enumerate(totals)
        ]
        put(self.target, op.y, place, channel, sums, op.limits, self.arch, lanes)


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
