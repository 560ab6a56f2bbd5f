"""Depthwise convolution of codes by relaxed dot products: the variant of ``qdepthwise`` where an
engine has them, over the same weights.

As in ``qdepthwise_dot`` four rows of the input are interleaved. Weights are, too, once for all rows
of their channels; sums begin with their excess (``relaxed``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import Registers, load, splat
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qdepthwise_dot import DotEmission
from edgepipe.kernels.relaxed import Factors
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
        self.factors = Factors(op.limit)

    def run(self) -> None:
        self.factors.ask()
        super().run()

    def prepare(self, chunk: Any) -> bool:
        """Weights as products want them, and the first sums."""
        (kh, kw), parts = self.op.kernel, self.parts
        count = kw * self.down * parts
        self.made = [Registers(count, _CHANNELS, "int8") for _ in range(self.factors.vectors)]
        self.firsts = Registers(parts, _LANES, "int32")
        zero = splat(tirx.const(0, "int8"), _CHANNELS)
        for part in range(parts):
            self.firsts[part] = super().first(chunk, part)
        for kx in range(kw):
            rows = [self.weight(chunk, ky, kx) for ky in range(kh)]
            for down in range(self.down):
                column = [zero] * down + rows + [zero] * (1 - down)
                for part, value in enumerate(super().interleaved(column)):
                    r = (kx * self.down + down) * parts + part
                    made = self.factors.weights(value)
                    for held, vector in zip(self.made, made, strict=True):
                        held[r] = vector
                    if down == 0:
                        self.firsts[part] = self.firsts[part] - self.factors.excess(made)
        return True

    def weight(self, chunk: Any, ky: int, kx: int) -> Any:
        """One tap of all channels of a chunk."""
        (kh, kw), each = self.op.kernel, _CHANNELS // self.stored
        taps = [((chunk * each + i) * kh + ky) * kw + kx for i in range(each)]
        halves = [load(self.weights, tap * self.stored, self.stored) for tap in taps]
        return halves[0] if each == 1 else tirx.Shuffle(halves, list(range(_CHANNELS)))

    def first(self, chunk: Any, part: int) -> Any:
        return self.firsts[part]

    def interleaved(self, rows: Sequence[Any]) -> list[Any]:
        return [self.factors.codes(word) for word in super().interleaved(rows)]

    def products(self, chunk: Any, part: int, kx: int) -> Callable[[Any, Any, int], Any]:
        def multiply(acc: Any, x: Any, down: int) -> Any:
            r = (kx * self.down + down) * self.parts + part
            return self.factors.accumulate(acc, x, [held[r] for held in self.made])

        return multiply
