"""Depthwise convolution in pairs of halves: inputs and weights are multiplied as they are stored.

A thread computes four channels of neighbouring pixels of a row, as in ``depthwise``; what is saved
beside half of the multiply-adds are the conversions, which a multiprocessor does at a quarter of
their rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import Registers
from edgepipe.kernels.cuda import depthwise, pairs
from edgepipe.kernels.cuda.pairs import WORDS
from edgepipe.kernels.cuda.threads import (
    LANES,
    zeros,
)
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Products that a sum of halves takes before it is added to a float32 total.
MOST_TAPS = 10


def matches(op: Op, target: Target) -> str | None:
    reason = depthwise.matches(op, target)
    return pairs.unfit(op, target) if reason is None else reason


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[c, 1, kh, kw]``, scales, ``b[c]`` → ``[kh][kw][c]`` and padded vectors."""
    weight, *vectors = arrays
    return depthwise.pack(op, knobs, [weight, *pairs.scales(op.weights, vectors)])


def emit(op: ConvOp, knobs: Knobs) -> Any:
    return depthwise.emitted("pair_depthwise", op, knobs["columns"], _sums)


def _sums(
    op: ConvOp, columns: int, source: Any, taps: Any, place: tuple[Any, Any, Any, Any]
) -> Registers:
    """Four float32 sums of each of ``columns`` pixels from ``place`` (n, block, row, column) on."""
    (kh, kw), block = op.kernel, place[1]
    totals, sums = zeros(columns, LANES), zeros(columns * WORDS, 1, "uint32")
    vector, weight = Registers(1, WORDS, "uint32"), Registers(kw, WORDS, "uint32")
    reads, held = depthwise.readers(op, columns), 0
    for ky in range(kh):
        if held and held + kw > MOST_TAPS:
            _settle(totals, sums)
            held = 0
        held += kw
        for kx in range(kw):
            weight[kx] = pairs.words(taps, (ky * kw + kx) * op.y.blocks * LANES + block * LANES)
        for shift, uses in reads:
            vector[0] = pairs.words(source, depthwise.input_offset(op, place, ky, shift))
            for i, kx in uses:
                for word in range(WORDS):
                    at = i * WORDS + word
                    sums[at] = pairs.fma(vector.lane(0, word), weight.lane(kx, word), sums[at])
    _settle(totals, sums)
    return totals


def _settle(totals: Registers, sums: Registers) -> None:
    """Add the sums of halves to the totals, and begin new ones."""
    for at in range(sums.count):
        for lane, half in enumerate((pairs.low, pairs.high)):
            index = at * 2 + lane
            T.buffer_store(totals.buffer, totals.buffer[index] + half(sums[at]), [index])
        sums[at] = tirx.const(0, "uint32")


TEMPLATE = KernelTemplate(
    name="pair_depthwise",
    matches=matches,
    default=depthwise.default,
    emit=emit,
    pack=pack,
    knobs=depthwise.knobs,
    rank=2,
    arithmetic="float16",
    accumulator="float16 up to 10 taps, float32",
)
