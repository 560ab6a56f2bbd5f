"""A convolution of codes whose inputs are packed as int16, a strip at a time, for WebAssembly.

As ``packed_conv`` has it for float32, and for its reasons. Widened once, inputs also need no
instruction of their own for every tile of channels. A step, four inputs of one run, has 16 bytes
for two pixels: ``[tile of pixels][pair][run][step][2][4]``. Weights are as in ``qconv``.

Of 4 bits two steps share bytes 16·w1 + w0, and x0·w0 + x1·w1 = x0·(16·w1 + w0) + (x1 - 16·x0)·w1:
with x1 - 16·x0 packed in place of x1, the byte is a factor as it is, and w1 takes one shift. All
first steps are packed before all second ones, a loop each: one over both would want more registers
than there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import (
    Registers,
    bytes_of,
    load,
    loop,
    minimum,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.dot import reinterpret
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qconv_geometry import Geometry
from edgepipe.kernels.qconv_tile import Emission
from edgepipe.kernels.template import Knobs


class PackedEmission(Emission):
    """One such kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, g: Geometry, buffers: Sequence[Any]) -> None:
        super().__init__(op, knobs, g, buffers)
        assert self.workspace is not None
        #: Packed inputs by bytes.
        self.packed = bytes_of(self.workspace)
        #: Steps of all runs whose weights have bytes of their own, or share them with as many.
        self.shared = g.runs * g.steps * op.bits // 8
        #: The tile of pixels that is being computed.
        self.packed_tile: Any = 0

    def run(self) -> None:
        with loop(self.op.y.n) as n:
            if self.sums is not None:
                self.input_sums(self.sums, n)
            self.strips(n)
        zero_border(self.op.y, self.target)

    def strips(self, n: Any) -> None:
        """Rows, or pixels of a flat image, a strip at a time: inputs packed, then all channels."""
        size, whole = self.g.strip, self.columns if self.flat else self.rows
        rows, columns = (1, size) if self.flat else (size, self.columns)
        tiles = -(-columns // self.pixels)
        with loop(-(-whole // size)) as strip:
            first = minimum(strip * size, whole - size)  # the last one overlaps its neighbour

            def place(down: Any, across: Any) -> tuple[Any, Any]:
                """Row and first pixel of a tile."""
                start = minimum(across * self.pixels, columns - self.pixels)
                return (0, first + start) if self.flat else (first + down, start)

            with loop(rows) as down, loop(tiles) as across:
                self.pack_inputs((n, 0, *place(down, across)), down * tiles + across)
            with loop(self.g.tiles) as tile, loop(rows) as down, loop(tiles) as across:
                self.packed_tile = down * tiles + across
                self.register_tile(n, tile, *place(down, across))

    def pack_inputs(self, at: Any, number: Any) -> None:
        """The codes of a tile of pixels as int16, ``[pair of pixels][run][step][2][4]``, at tile
        ``number`` of the workspace."""
        (kh, _), kw, steps = self.op.kernel, 1 if self.g.merged else self.op.kernel[1], self.g.steps
        places = [T.bind(self.input_offset(at, (0, 0, 0), i)) for i in range(self.pixels)]
        to = T.bind(number * (self.pixels // 2 * self.g.pair_bytes))

        def put(bytes_: Any, words: Any) -> None:
            store(self.packed, bytes_, reinterpret("int8x16", words), 16)

        with loop(kh) as ky, loop(kw) as kx:
            moved = self.input_offset(at, (0, ky, kx), 0) - self.input_offset(at, (0, 0, 0), 0)
            run = (ky * kw + kx) * steps
            for pair in range(self.pixels // 2):
                pixels = places[2 * pair : 2 * pair + 2]
                end = to + pair * self.g.pair_bytes
                with loop(steps // 2) as s:
                    a, b = (self.wide(p + moved + s * 8, 8) for p in pixels)
                    first, second = (tirx.Shuffle([a, b], [h, 2 + h]) for h in range(2))
                    if self.op.bits == 4:
                        put(end + (run // 2 + s) * 16, first)
                        put(end + (run // 2 + s + self.shared) * 16, beside(first, second))
                    else:
                        put(end + (run + s * 2) * 16, first)
                        put(end + (run + s * 2 + 1) * 16, second)
                if steps % 2:
                    last = [self.wide(p + moved + (steps - 1) * 4, 4) for p in pixels]
                    put(end + (run + steps - 1) * 16, tirx.Shuffle(last, [0, 1]))

    def unpacked(self, both: Any, u: int) -> Any:
        """Of two weights that share a byte, all of it in place of the lower one."""
        return super().unpacked(both, u) if u else both - self.short(8 * 16 + 8)

    def wide(self, place: Any, count: int) -> Any:
        """Codes as int16, four to an int64."""
        wide = tirx.Cast(f"int16x{count}", load(self.source, place, count))
        return reinterpret("int64x2" if count == 8 else "int64", wide)

    def accumulate(self, acc: Registers, *at: Any) -> None:
        """Sum over all steps, counting in bytes."""
        pair = self.g.pair_bytes
        first = T.bind(self.packed_tile * (self.pixels // 2 * pair))

        def operand(place: Any, u: int, i: int) -> Any:
            del u  # every loop has its own place
            return self.four(place + i // 2 * pair + i % 2 * 8)

        weights = at[1] * self.g.tile_bytes
        for u in range(8 // self.op.bits):
            inputs = T.bind(first + u * self.shared * 16)
            self.counted(acc, (inputs, 16), weights, self.shared, operand, [u])

    def four(self, place: Any) -> Any:
        """The four inputs at byte ``place``, as often as vectors have them."""
        lanes, four = self.dot.lanes, reinterpret("int64", load(self.packed, place, 8))
        return reinterpret(f"int16x{2 * lanes}", splat(four, lanes // 2))


def beside(first: Any, second: Any) -> Any:
    """The inputs of a second step (int64x2, as those of the first), as its weights want them."""
    x0, x1 = (reinterpret("int16x8", x) for x in (first, second))
    return reinterpret("int64x2", x1 - (x0 << splat(tirx.const(4, "int16"), 8)))
