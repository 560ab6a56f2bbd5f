"""Winograd's F(2x2, 3x3) over weights as ``qconv`` stores them for relaxed dot products:
the plain form of kernels that have such a variant, for engines without them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import dot
from edgepipe.kernels.builder import kernel, load, loop, splat
from edgepipe.kernels.dot import reinterpret
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments
from edgepipe.kernels.qwinograd import (
    PAIRS,
    TYPES,
    WORKSPACES,
    Emission,
    channels_of,
    knobs_of,
    unfit,
)
from edgepipe.kernels.template import Knobs
from edgepipe.kernels.winograd_loops import TAPS


def reads(op: QConvOp, stored: int) -> bool:
    """Whether ``emit_stored`` can run ``op``, and does it faster than sums of products: weights of
    ``stored`` vectors of channels together."""
    return unfit(op, PAIRS) is None and channels_of(op) % (stored * PAIRS.lanes) == 0


def emit_stored(op: QConvOp, held: Knobs, buffers: Sequence[tuple[str, int, str]]) -> Any:
    """The kernel over weights as ``qconv`` stores them, with its knobs and buffers, for the plain
    form of those that have a relaxed variant."""
    return kernel("q_conv", buffers, lambda *arguments: _Stored(op, held, arguments).run())


def workspaces(op: QConvOp, held: Knobs) -> tuple[int, ...]:
    """int32 elements of the buffers that ``emit_stored`` takes last."""
    count = len(arguments(op, (0, ""), 0, (0,) * (1 + WORKSPACES)))
    sizes = _Stored(op, held, [None] * count).sizes()
    return tuple(-(-s * np.dtype(d).itemsize // 4) for s, d in zip(sizes, TYPES, strict=True))


class _Stored(Emission):
    """The kernel that reads what ``qconv`` stores: ``[tile][3][3][ci / 4][vector][lanes][4]``, with
    an offset, the codes of 4 bits of eight inputs in four bytes."""

    def __init__(self, op: QConvOp, held: Knobs, buffers: Sequence[Any]) -> None:
        # The sums of inputs are the variant's: codes less the offset do without.
        *own, _sums, u, v, m = buffers
        super().__init__(op, knobs_of(op, PAIRS, held["arch"]), own)
        self.stored, self.offset, self.given = held["stored"], held["offset"], (u, v, m)

    def workspaces(self) -> list[Any]:
        """Arguments, which the variant has, too."""
        given = zip(self.given, self.sizes(), TYPES, strict=True)
        return [T.decl_buffer((size,), dtype, data=b.data) for b, size, dtype in given]

    def transform_weights(self, split: Any) -> None:
        lanes, together, words = self.lanes, 8 // self.op.bits, self.inputs // 4
        count = self.tiles * self.blocks
        row = self.stored * 4 * lanes  # bytes of a step: of four inputs, or eight of 4 bits
        with loop(count) as v, loop(words // together) as s:
            vector = split * count + v
            place = tirx.floordiv(vector, self.stored) * (TAPS * words // together) + s
            first = T.bind(place * row + tirx.floormod(vector, self.stored) * (4 * lanes))
            taps = [
                load(self.weights, first + tap * (words // together) * row, 4 * lanes)
                for tap in range(TAPS)
            ]
            block = tirx.floormod(v, self.blocks) * self.elements
            for which in range(together):
                halves = [self.pairs_of(tap, which) for tap in taps]
                for h in range(2):
                    step = (s * together + which) * 2 + h
                    at = step * (self.width * self.step) + block
                    self.put(tirx.floordiv(v, self.blocks), at, [tap[h] for tap in halves])

    def pairs_of(self, codes: Any, which: int) -> list[Any]:
        """The first two and the last two inputs of every lane, int16."""
        size = 4 * self.lanes
        if self.op.bits == 4:
            codes = dot.nibble(codes, size, which, self.arch, self.offset)
        wide = tirx.Cast(f"int16x{size}", reinterpret(f"uint8x{size}", codes))
        wide = wide - splat(tirx.const(self.offset, "int16"), size)
        words = reinterpret(f"int32x{2 * self.lanes}", wide)
        parts = [tirx.Shuffle([words], list(range(h, 2 * self.lanes, 2))) for h in range(2)]
        return [reinterpret(f"int16x{self.elements}", part) for part in parts]
