"""Depthwise convolution over planes, for networks whose sparse convolutions keep them in planes.

Vectors run along the pixels of a row. At stride 2 two neighbouring vectors are loaded and their
even or odd elements taken, which reads one element past the last tap: ``spare_columns``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels.builder import (
    Registers,
    fma,
    kernel,
    load,
    loop,
    parallel,
    splat,
    zero_border,
)
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.output import signature
from edgepipe.kernels.planes import Cut, put
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp) or op.groups == 1 or op.y.lanes != 1:
        return ""
    if op.groups != op.x.c or op.y.c != op.x.c or op.x.lanes != 1:
        return "not one filter per channel"
    if op.strides[1] > 2 or not op.weights.plain:
        return "a horizontal stride above 2, or its weights are not float32"
    reach = 2 * op.y.w + (op.kernel[1] - 1) * op.dilations[1] - op.offset[1]
    if op.strides[1] == 2 and op.x.w + op.x.pads[3] < reach:
        return "no spare column to the right of its input"
    return None


def default(op: ConvOp, target: Target) -> Knobs:
    most = 2 if target.kind == "wasm" else 8 if target.simd.registers == 32 else 4
    cut = Cut.of(op.y.h, op.y.w, target.simd.lanes_f32, most)
    if (target.arch == "aarch64" or target.kind == "wasm") and cut.rows == 1 and op.y.h > 1:
        # Two rows share the inputs between them.
        cut = Cut.of(op.y.h, op.y.w, target.simd.lanes_f32, most // 2)
        cut = Cut(op.y.h, op.y.w, 2, cut.vectors, cut.lanes)
    return cut.knobs(target)


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, kh, kw]`` and ``b[c]`` as they are."""
    return [np.ascontiguousarray(a, np.float32) for a in arrays]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    taps = op.kernel[0] * op.kernel[1]
    inputs = [
        ("x", op.x.elements, "float32"),
        ("w", op.y.c * taps, "float32"),
        ("b", op.y.c, "float32"),
    ]
    return kernel(
        "depthwise_planes", signature(op, inputs), lambda *b: _Emission(op, knobs, b).run()
    )


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: ConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.fused = op, knobs["fused"]
        self.source, self.weights, self.bias, *self.residuals, self.target = buffers
        self.cut = Cut(op.y.h, op.y.w, knobs["rows"], knobs["vectors"], knobs["lanes"])

    def run(self) -> None:
        down, across = self.cut.tiles
        (kh, kw), lanes = self.op.kernel, self.cut.lanes
        with parallel(self.op.y.n) as n, parallel(self.op.y.c) as channel:
            kept = Registers(kh * kw, lanes)
            for tap in range(kh * kw):
                kept[tap] = splat(self.weights[channel * kh * kw + tap], lanes)
            with parallel(down) as i, loop(across) as j:
                self.register_tile(n, channel, kept, *self.cut.start(i, j))
        zero_border(self.op.y, self.target)

    def register_tile(self, n: Any, channel: Any, kept: Registers, row: Any, column: Any) -> None:
        op, lanes = self.op, self.cut.lanes
        (kh, kw), (sy, _), (dy, _) = op.kernel, op.strides, op.dilations
        acc = Registers(self.cut.count, lanes)
        for r in range(self.cut.count):
            acc[r] = splat(self.bias[channel], lanes)
        rows = range(self.cut.rows)
        # One pass over the input rows of the tile; each feeds every output row it belongs to.
        for line in sorted({r * sy + ky * dy for r in rows for ky in range(kh)}):
            for v, step in enumerate(self.cut.steps):
                for kx in range(kw):
                    vector = None
                    for r in rows:
                        ky, rest = divmod(line - r * sy, dy)
                        if rest or not 0 <= ky < kh:
                            continue
                        if vector is None:
                            vector = self.inputs(n, channel, row * sy + line, column + step, kx)
                        at = r * self.cut.vectors + v
                        acc[at] = fma(vector, kept[ky * kw + kx], acc[at], lanes, self.fused)
        for r in rows:
            for v, step in enumerate(self.cut.steps):
                place = (n, channel, row + r, column + step)
                put(op, self.residuals, self.target, place, acc[r * self.cut.vectors + v], lanes)

    def inputs(self, n: Any, channel: Any, row: Any, column: Any, kx: int) -> Any:
        """What tap ``kx`` of ``lanes`` neighbouring outputs reads in one row."""
        op, lanes, stride = self.op, self.cut.lanes, self.op.strides[1]
        # Of a pair of vectors one tap has the even columns and the next one the odd.
        odd = kx % 2 if stride == 2 and lanes > 1 and op.dilations[1] == 1 else 0
        first = column * stride + (kx - odd) * op.dilations[1] - op.offset[1]
        at = op.x.offset(n, channel, row - op.offset[0], first)
        if stride == 1 or lanes == 1:
            return load(self.source, at, lanes)
        pair = load(self.source, at, 2 * lanes)
        return tirx.Shuffle([pair], [2 * i + odd for i in range(lanes)])


TEMPLATE = KernelTemplate(
    name="depthwise_planes", matches=matches, default=default, emit=emit, pack=pack, rank=3
)
