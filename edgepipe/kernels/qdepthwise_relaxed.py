"""Depthwise convolution of codes by relaxed dot products: the variant of ``qdepthwise`` where an
engine has them, over the same weights.

As in ``qdepthwise_dot`` four rows of the input are interleaved. Weights are, too, once for all rows
of their channels, and taken apart (``dot.magnitudes``); sums begin with what complements take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import Registers, load, splat
from edgepipe.kernels.dot import magnitudes
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qdepthwise_dot import DotEmission
from edgepipe.kernels.template import Knobs
from edgepipe.target import Target

#: Channels at a time; they are four in a dot product.
_CHANNELS, _LANES = 16, 4


def knobs(op: QConvOp, target: Target) -> dict[str, int]:
    """``relaxed``: pixels of a row at a time, where these kernels take the convolution."""
    fits = (
        target.integer.dot == "relaxed"
        and op.kernel[0] == 3
        and op.dilations == (1, 1)
        and op.x.dtype == "int8"
        and op.x.lanes % _CHANNELS == 0
    )
    return {"relaxed": min(2, op.y.w)} if fits else {}


class RelaxedEmission(DotEmission):
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        own = {"columns": knobs["relaxed"], "dot": "relaxed", "lanes": _LANES, "signed": True}
        super().__init__(op, {**own, "arch": knobs["arch"]}, buffers)
        #: Channels that ``qdepthwise`` stores together.
        self.stored = knobs["lanes"]

    def prepare(self, chunk: Any) -> bool:
        """Magnitudes and signs of the weights, and the first sums."""
        (kh, kw), parts = self.op.kernel, self.parts
        self.sizes = Registers(kw * self.down * parts, _CHANNELS, "int8")
        self.signs = Registers(kw * self.down * parts, _CHANNELS, "int8")
        self.firsts = Registers(parts, _LANES, "int32")
        zero = splat(tirx.const(0, "int8"), _CHANNELS)
        none = splat(tirx.const(0, "int32"), _LANES)
        for part in range(parts):
            self.firsts[part] = super().first(chunk, part)
        for kx in range(kw):
            rows = [self.weight(chunk, ky, kx) for ky in range(kh)]
            for down in range(self.down):
                column = [zero] * down + rows + [zero] * (1 - down)
                for part, value in enumerate(self.interleaved(column)):
                    r = (kx * self.down + down) * parts + part
                    self.sizes[r], self.signs[r] = magnitudes(value)
                    if down == 0:
                        taken = self.dot.accumulate(none, self.signs[r], self.sizes[r])
                        self.firsts[part] = self.firsts[part] - taken
        return True

    def weight(self, chunk: Any, ky: int, kx: int) -> Any:
        """One tap of all channels of a chunk."""
        (kh, kw), each = self.op.kernel, _CHANNELS // self.stored
        taps = [((chunk * each + i) * kh + ky) * kw + kx for i in range(each)]
        halves = [load(self.weights, tap * self.stored, self.stored) for tap in taps]
        return halves[0] if each == 1 else tirx.Shuffle(halves, list(range(_CHANNELS)))

    def first(self, chunk: Any, part: int) -> Any:
        return self.firsts[part]

    def products(self, chunk: Any, part: int, kx: int) -> Callable[[Any, Any, int], Any]:
        def multiply(acc: Any, x: Any, down: int) -> Any:
            r = (kx * self.down + down) * self.parts + part
            return self.dot.accumulate(acc, tirx.bitwise_xor(x, self.signs[r]), self.sizes[r])

        return multiply
