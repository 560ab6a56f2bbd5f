"""A register tile of a convolution of codes, and the loops around it; see ``qconv``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import dot, qwinograd
from edgepipe.kernels.builder import (
    Registers,
    counting,
    forward,
    load,
    loop,
    minimum,
    neighbours,
    parallel,
    pixels_from,
    splat,
    store,
    zero_border,
)
from edgepipe.kernels.dot import reinterpret
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qconv_geometry import Geometry
from edgepipe.kernels.qconv_long import LongSums
from edgepipe.kernels.qproduct import finished
from edgepipe.kernels.requantize import emit_codes, put_pixels
from edgepipe.kernels.template import Knobs


class Emission:
    """One kernel being emitted: the loops around a register tile, and the tile itself."""

    def __init__(self, op: QConvOp, knobs: Knobs, g: Geometry, buffers: Sequence[Any]) -> None:
        self.op, self.knobs, self.g, self.dot = op, knobs, g, g.dot
        self.source, self.weights, self.bias, self.multipliers, *self.rest = buffers
        if knobs.get("winograd"):  # the plain form, whose workspaces these are
            del self.rest[-qwinograd.WORKSPACES :]
        #: Packed inputs, which a variant has without using them (``qconv_packed``).
        self.workspace = self.rest.pop() if knobs.get("strip") else None
        #: What is added to the sums of every pixel, where accumulators begin with it.
        self.sums = self.rest.pop() if knobs["offset"] else None
        if self.dot.name == "pairs" and op.bits == 4:  # weights lose their offset: see ``unpacked``
            self.sums = None
        self.target = self.rest.pop()
        self.pixels, self.groups, self.flat = knobs["pixels"], knobs["groups"], knobs["flat"]
        if self.dot.name == "relaxed":
            self.pixels, self.groups = knobs["relaxed"], g.stored
        #: Which part of the channels stored together a register tile has.
        self.part: Any = 0
        self.rows, self.columns = (1, op.y.h * op.y.w) if self.flat else (op.y.h, op.y.w)

    def run(self) -> None:
        full, rest = divmod(self.columns, self.pixels)
        if rest and not self.knobs.get("rest"):
            full, rest = full + 1, 0
        last = copy(self)
        last.pixels = rest
        # Sums are those of all pixels: nobody may go ahead of them.
        shared = parallel if self.sums is None else loop
        with shared(self.op.y.n) as n:
            if self.sums is not None:
                self.input_sums(self.sums, n)
            if self.g.word:  # inputs that take putting together serve all channels
                with shared(self.rows) as row:
                    with shared(full) as column_tile, shared(self.g.tiles) as tile:
                        self.register_tile(n, tile, row, self.start(column_tile))
                    if rest:  # not shared: of two loops side by side none would be
                        with loop(self.g.tiles) as tile:
                            last.register_tile(n, tile, row, self.columns - rest)
            else:
                with shared(self.g.tiles) as tile, shared(self.rows) as row:
                    with shared(full) as column_tile:
                        self.register_tile(n, tile, row, self.start(column_tile))
                    if rest:
                        last.register_tile(n, tile, row, self.columns - rest)
        zero_border(self.op.y, self.target)

    def start(self, column_tile: Any) -> Any:
        """First pixel of a tile; the last one is moved back where it is as wide as the others."""
        if self.knobs.get("rest"):
            return column_tile * self.pixels
        return minimum(column_tile * self.pixels, self.columns - self.pixels)

    def input_sums(self, sums: Any, n: Any) -> None:
        """What the offset of the weights adds to every pixel's sums, negated."""
        (kh, _), kw = self.op.kernel, 1 if self.g.merged else self.op.kernel[1]
        first, second = (self.input_offset((0, 0, 0, 0), (0, 0, 0), i) for i in (0, 1))
        with loop(self.rows) as row, loop(kh) as ky, loop(kw) as kx:
            codes = self.source[self.input_offset((n, 0, row, 0), (0, ky, kx), 0)]
            addresses = [tirx.address_of(at) for at in (codes, sums[row * self.columns])]
            sizes = (self.columns, second - first, self.g.steps * 4, -self.knobs["offset"], ky + kx)
            words = [tirx.const(s, "int32") if isinstance(s, int) else s for s in sizes]
            T.evaluate(tirx.call_extern("int32", "edgepipe_add_codes", *addresses, *words))

    def register_tile(self, n: Any, tile: Any, row: Any, start: Any) -> None:
        """Accumulate ``pixels`` x ``groups`` vectors, then requantise and store; one part of those
        stored together after the other."""
        if self.groups == self.g.stored:
            self.register_part(n, tile, row, start)
            return
        with loop(self.g.stored // self.groups) as self.part:
            self.register_part(n, tile, row, start)

    def register_part(self, n: Any, tile: Any, row: Any, start: Any) -> None:
        lanes, parts, arch = self.dot.lanes, self.dot.parts, self.knobs["arch"]
        channel = minimum(tile * self.g.width, self.g.channels - self.g.width)
        channel = channel + self.part * (self.groups * lanes)
        acc = Registers(self.pixels * self.groups * parts, lanes, "int32")
        zero = splat(tirx.const(0, "int32"), lanes)
        for j in range(self.groups):
            first = load(self.bias, channel + j * lanes, lanes) if parts == 1 else zero
            for i in range(self.pixels):
                value = first
                if parts == 1 and self.sums is not None:
                    value = first + splat(self.sums[row * self.columns + start + i], lanes)
                for p in range(parts):
                    acc[(i * self.groups + j) * parts + p] = value
        self.accumulate(acc, n, tile, row, start)
        if self.knobs.get("apart") and self.op.y.dtype != "float32" and self.g.width == 16:
            self.put_apart(acc, (n, row, start), channel)
            return
        pixels = pixels_from(self.op.y, row, start, self.pixels, self.flat)
        places = [(n, *pixel) for pixel in pixels]
        sums = [
            [self.sum(acc, i, j, channel, place) for j in range(self.groups)]
            for i, place in enumerate(places)
        ]
        put_pixels(self.target, self.op.y, places, channel, sums, self.op.limits, arch, lanes)

    def put_apart(self, acc: Registers, at: tuple[Any, Any, Any], channel: Any) -> None:
        """Codes of all pixels first, which are then stored at constant distances."""
        (n, row, start), y, lanes = at, self.op.y, self.dot.lanes
        codes = Registers(self.pixels, self.groups * lanes, y.dtype)
        for i in range(self.pixels):
            place = (n, row, start + i)
            sums = [self.sum(acc, i, j, channel, place) for j in range(self.groups)]
            codes[i] = emit_codes(sums, y, self.op.limits, self.knobs["arch"], lanes)

        def store_all(pixel: tuple[Any, Any], gaps: Sequence[Any]) -> None:
            base = y.offset(n, 0, *pixel) + channel
            for i, gap in enumerate(gaps):
                store(self.target, base + (gap + i) * y.lanes, codes[i], codes.lanes)

        even = y.w % 2 == self.knobs["pixels"] % 2 == 0
        neighbours(y, row, start, self.pixels, self.flat, even, store_all)

    def sum(self, acc: Registers, i: int, j: int, channel: Any, place: Any) -> Any:
        """The float sum of one vector of channels of one pixel."""
        total, c = self.total(acc, i, j, channel, place), channel + j * self.dot.lanes
        return finished(self.op, total, self.multipliers, self.rest, place, c, self.dot.lanes)

    def total(self, acc: Registers, i: int, j: int, channel: Any, place: Any) -> Any:
        """The same as int32, without the multipliers."""
        lanes, parts = self.dot.lanes, self.dot.parts
        first = (i * self.groups + j) * parts
        total = self.dot.total([acc[first + p] for p in range(parts)])
        if parts > 1:  # what does not fit into partial sums
            total = total + load(self.bias, channel + j * lanes, lanes)
            if self.sums is not None:
                total = total + splat(self.sums[place[1] * self.op.y.w + place[2]], lanes)
        return total

    # -- the inner loops ----------------------------------------------------------------------

    def accumulate(self, acc: Registers, *at: Any) -> None:
        """Sum over the runs, in the order in which the weights are packed."""
        if self.g.word:
            with loop(self.g.runs) as run:
                LongSums(self, acc, at, (run, 0, 0)).shared_step()
            return
        kw = 1 if self.g.merged else self.op.kernel[1]
        with loop(self.op.kernel[0]) as ky, loop(kw) as kx:
            run = ky * kw + kx
            if self.knobs["arch"] == "wasm32":
                self.counted_run(acc, at, (run, ky, kx))
            else:
                self.run_of_steps(acc, at, (run, ky, kx))

    def run_of_steps(self, acc: Registers, at: Any, run: Any) -> None:
        """All steps of a run."""
        if self.dot.name == "mlal":
            LongSums(self, acc, at, run).all_steps()
            return
        chunk = int(self.knobs["unroll"])
        whole, rest = divmod(self.g.steps, chunk)
        with loop(whole) as s:
            self.steps(acc, at, run, s * chunk, chunk)
        if rest:
            self.steps(acc, at, run, self.g.steps - rest, rest)

    def counted_run(self, acc: Registers, at: Any, run: Any) -> None:
        """The same for WebAssembly, whose loads have constant distances from a counted place."""
        inputs = T.bind(self.input_offset(at, run, 0))
        weights = (at[1] * self.g.runs + run[0]) * self.g.run_stride
        apart = (1 if self.flat else self.op.strides[1]) * self.op.x.lanes

        def operand(place: Any, u: int, i: int) -> Any:
            return self.dot.operand(self.source, place + i * apart + u * 4)

        together = 8 // self.op.bits  # steps that share bytes of weights
        count = self.g.steps // together
        self.counted(acc, (inputs, 4 * together), weights, count, operand, range(together))

    def counted(
        self, acc: Registers, inputs: tuple[Any, int], weights: Any, count: int,
        operand: Callable[[Any, int, int], Any], which: Sequence[int],
    ) -> None:  # fmt: skip
        """Multiply-add ``count`` times the steps ``which`` of those that share bytes of weights:
        inputs from a byte on, so many bytes apart, and weights.

        ``operand(place, u, i)`` is what step u has for pixel i, from the counted byte of step 0.
        """
        parts = self.dot.parts
        first, stride = inputs
        row_bytes = parts * self.dot.part_bytes
        of_weights = T.bind(weights + self.part * (self.groups * row_bytes))
        strides = stride, self.g.stored * row_bytes
        with counting(count, *strides) as (in_inputs, in_weights):
            place, row = forward(first + in_inputs), forward(of_weights + in_weights)
            for u in which:
                values = [operand(place, u, i) for i in range(self.pixels)]
                for j in range(self.groups):
                    for p in range(parts):
                        codes = self.step_weights(row, u, j, p)
                        for i in range(self.pixels):
                            r = (i * self.groups + j) * parts + p
                            acc[r] = self.dot.accumulate(acc[r], values[i], codes)

    def steps(self, acc: Registers, at: Any, run: Any, step: Any, count: int) -> None:
        """``count`` steps from ``step`` on, unrolled."""
        operand = self.operands(at, run, step, count)
        for u in range(count):
            inputs = [operand(u, i) for i in range(self.pixels)]
            for j in range(self.groups):
                for p in range(self.dot.parts):
                    w = self.weight(at, run, step, u, j, p)
                    for i in range(self.pixels):
                        r = (i * self.groups + j) * self.dot.parts + p
                        acc[r] = self.dot.accumulate(acc[r], inputs[i], w)

    def operands(self, at: Any, run: Any, step: Any, count: int) -> Callable[[int, int], Any]:
        """The inputs of steps ``step + u`` of pixels ``i``; where an instruction takes one of the
        four words of a register, sixteen bytes at once."""
        places = [self.input_offset(at, run, i) + step * 4 for i in range(self.pixels)]
        if self.dot.name == "sdot" and count % 4 == 0:
            words = Registers(self.pixels, 4, "int32")

            def of_pixel(u: int, i: int) -> Any:
                if u % 4 == 0:
                    words[i] = self.words(places[i] + u * 4)
                return self.dot.word(words.lane(i, u % 4))

            return of_pixel
        stride = self.op.strides[1]
        length = (self.pixels - 1) * stride + count
        if self.dot.name == "sdot" and self.g.merged and self.op.x.lanes == 4 <= length:
            # A word is a pixel of the input, of an image for example, which neighbours share. The
            # last ones are moved back, not to read past what is theirs.
            starts = [min(first, length - 4) for first in range(0, length, 4)]
            words = Registers(len(starts), 4, "int32")
            for k, first in enumerate(starts):
                words[k] = self.words(places[0] + first * 4)

            def of_row(u: int, i: int) -> Any:
                k = (i * stride + u) // 4
                return self.dot.word(words.lane(k, i * stride + u - starts[k]))

            return of_row
        return lambda u, i: self.dot.operand(self.source, places[i] + u * 4)

    def words(self, place: Any) -> Any:
        """Sixteen bytes as int32x4."""
        return reinterpret("int32x4", load(self.source, place, 16))

    def weight(
        self, at: Any, run: Any, step: Any, u: int, j: int, part: int, whole: bool = False
    ) -> Any:
        """Weights of one part of step ``step + u``; with 4 bits ``step`` is even, and its bytes
        have one weight each where they are ``whole``."""
        bits, count = self.op.bits, self.dot.part_bytes
        local = step + u if bits == 8 else (step * bits // 8) + u // 2
        if bits == 4 and not isinstance(step, int):
            local = tirx.floordiv(step, 2) + u // 2
        base = (at[1] * self.g.runs + run[0]) * self.g.run_stride
        first = base + local * (self.g.stored * self.dot.parts * count)
        return self.step_weights(first, u, j, part, whole)

    def step_weights(self, step: Any, u: int, j: int, part: int, whole: bool = False) -> Any:
        """The same, where the step, or with 4 bits its pair of steps, begins at byte ``step``."""
        count, parts = self.dot.part_bytes, self.dot.parts
        codes = load(self.weights, step + (j * parts + part) * count, count)
        if self.op.bits == 4 and self.dot.name == "pairs":
            return self.unpacked(self.dot.weight(codes, unsigned=True), u)
        if self.op.bits == 4 and not whole:
            codes = dot.nibble(codes, count, u % 2, self.knobs["arch"], self.knobs["offset"])
        return self.dot.weight(codes, unsigned=bool(self.knobs["offset"]))

    def unpacked(self, both: Any, u: int) -> Any:
        """The lower (0) or upper (1) weights out of 16 * (w1 + 8) + w0 + 8, int16."""
        if u == 0:
            return (both & self.short(15)) - self.short(8)
        # Of the bytes alone LLVM would shift bytes, for which x86 has no instruction.
        return tirx.shift_right(both - self.short(128), self.short(4))

    def short(self, value: int) -> Any:
        """``value`` in all lanes of int16 weights."""
        return splat(tirx.const(value, "int16"), self.dot.part_bytes)

    def input_offset(self, at: Any, run: Any, pixel: int) -> Any:
        (n, tile, row, start), (_, ky, kx) = at, run
        op, x = self.op, self.op.x
        first: Any = 0
        if op.groups > 1:
            first = tile // (self.g.tiles // op.groups) * self.g.ci
        if self.flat:
            return (n * (x.h * x.w) + start + pixel) * x.lanes + first
        in_y = row * op.strides[0] + ky * op.dilations[0] - op.offset[0]
        in_x = (start + pixel) * op.strides[1] + kx * op.dilations[1] - op.offset[1]
        return x.offset(n, 0, in_y, in_x) + first
