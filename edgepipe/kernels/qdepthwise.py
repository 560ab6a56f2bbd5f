"""Depthwise convolution of codes: channels in the lanes, a tile of output pixels.

Products of two bytes fit int16; as many of them as the weights' magnitude allows are added there
before they are widened to the int32 accumulator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels import qdepthwise_relaxed
from edgepipe.kernels.builder import Registers, kernel, load, loop, minimum, parallel, zero_border
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, finished, vectors
from edgepipe.kernels.requantize import put
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or not op.depthwise:
        return ""
    if op.x.blocks > 1 or op.x.lanes % 8:
        return "its input is not in NHWC with channels in eights"
    if op.y.dtype == "float32" and op.y.lanes % 8:
        return "its float output has vectors of fewer than 8 channels"
    return None


def short_sums(taps: np.ndarray, signed: bool) -> tuple[int, ...]:
    """Weights ``[channels, taps]`` → how many of them in turn surely sum up in int16 with codes."""
    limit = 32767 // (128 if signed else 255)
    sizes, total = [0], np.zeros(len(taps), np.int64)
    for column in np.abs(taps.astype(np.int64)).T:
        if sizes[-1] and (total + column).max() > limit:
            sizes.append(0)
            total[:] = 0
        total += column
        sizes[-1] += 1
    return tuple(sizes)


def default(op: QConvOp, target: Target) -> Knobs:
    signed, taps = op.x.dtype == "int8", op.kernel[0] * op.kernel[1]
    wide = target.arch == "x86_64" and op.x.lanes % 16 == 0
    wide = wide and (op.y.dtype != "float32" or op.y.lanes % 16 == 0)
    return {
        "lanes": 16 if wide else 8,
        "columns": _columns(op.y.w, target),
        "sums": op.short_sums or short_sums(np.full((1, taps), op.limit), signed),
        "arch": target.arch,
        **qdepthwise_relaxed.knobs(op, target),
    }


def variant(op: QConvOp, knobs: Knobs, name: str) -> Knobs | None:
    """Dot products where the engine has them, over the same weights."""
    del op
    return {**knobs, "dot": "relaxed"} if name == "relaxed" and "relaxed" in knobs else None


def _columns(width: int, target: Target) -> int:
    """Pixels of a row at a time: as many as registers hold, and as divide the row best."""
    if target.simd.registers < 32:
        return min(width, 2 if target.kind == "wasm" or target.arch == "arm" else 4)
    return min(range(min(width, 4), min(width, 7) + 1), key=lambda n: -(-width // n) * n)


def settings(op: QConvOp, target: Target) -> list[Knobs]:
    """Other numbers of pixels and channels at a time."""
    base = default(op, target)
    return [
        {**base, "lanes": lanes, "columns": columns}
        for lanes in ((8, 16) if base["lanes"] == 16 else (8,))
        for columns in range(1, min(op.y.w, 8) + 1)
    ]


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, kh, kw]``, ``b[c]``, ``m[c]`` → ``[chunk][kh][kw][lane]`` and padded vectors."""
    weight = arrays[0]
    c, _, kh, kw = weight.shape
    lanes = knobs["lanes"]
    channels = op.x.lanes
    grown = np.zeros((channels, kh, kw), np.int8)
    grown[:c] = weight[:, 0]
    blocked = grown.reshape(channels // lanes, lanes, kh, kw).transpose(0, 2, 3, 1)
    return [np.ascontiguousarray(blocked), *vectors(op, arrays, channels)]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    (kh, kw), channels = op.kernel, op.x.lanes
    buffers = arguments(op, (channels * kh * kw, "int8"), channels)
    emission = qdepthwise_relaxed.RelaxedEmission if knobs.get("dot") else _Emission
    return kernel("q_depthwise", buffers, lambda *held: emission(op, knobs, held).run())


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs, self.lanes = op, knobs, knobs["lanes"]
        self.source, self.weights, self.bias, self.multipliers, *self.rest = buffers
        self.target = self.rest.pop()
        self.columns = knobs["columns"]
        self.short, self.long = f"int16x{self.lanes}", f"int32x{self.lanes}"

    def run(self) -> None:
        y = self.op.y
        chunks, tiles = self.op.x.lanes // self.lanes, -(-y.w // self.columns)
        with (
            parallel(y.n) as n,
            parallel(chunks) as chunk,
            parallel(y.h) as row,
            loop(tiles) as tile,
        ):
            column = minimum(tile * self.columns, y.w - self.columns)
            self.output_tile(n, chunk, row, column)
        zero_border(y, self.target)

    def output_tile(self, n: Any, chunk: Any, row: Any, column: Any) -> None:
        channel = chunk * self.lanes
        acc = Registers(self.columns, self.lanes, "int32")
        for i in range(self.columns):
            acc[i] = load(self.bias, channel, self.lanes)
        kh, kw = self.op.kernel
        taps = [(ky, kx) for ky in range(kh) for kx in range(kw)]
        for count in self.knobs["sums"]:
            together, taps = taps[:count], taps[count:]
            for i in range(self.columns):
                total: Any = None
                for tap in together:
                    product = self.product((n, row, column + i), chunk, tap)
                    total = product if total is None else total + product
                acc[i] = acc[i] + tirx.Cast(self.long, total)
        for i in range(self.columns):
            self.store(acc[i], (n, row, column + i), channel)

    def product(self, place: Any, chunk: Any, tap: tuple[int, int]) -> Any:
        """Input times weight of one tap, int16."""
        op, (n, row, column), (ky, kx) = self.op, place, tap
        in_y = row * op.strides[0] + ky * op.dilations[0] - op.offset[0]
        in_x = column * op.strides[1] + kx * op.dilations[1] - op.offset[1]
        at = op.x.offset(n, 0, in_y, in_x) + chunk * self.lanes
        number = (chunk * op.kernel[0] + ky) * op.kernel[1] + kx
        weight = load(self.weights, number * self.lanes, self.lanes)
        codes = load(self.source, at, self.lanes)
        return tirx.Cast(self.short, codes) * tirx.Cast(self.short, weight)

    def store(self, total: Any, place: Any, channel: Any) -> None:
        op, lanes = self.op, self.lanes
        value = finished(op, total, self.multipliers, self.rest, place, channel, lanes)
        put(self.target, op.y, place, channel, [value], op.limits, self.knobs["arch"], lanes)


TEMPLATE = KernelTemplate(
    name="q_depthwise",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=settings,
    variant=variant,
    rank=2,
    arithmetic="int8",
    accumulator="int32",
)
