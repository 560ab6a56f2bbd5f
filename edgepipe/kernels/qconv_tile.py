"""A register tile of a convolution of codes, and the loops around it; see ``qconv``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, load, loop, minimum, splat, store, zero_border
from edgepipe.kernels.dot import Dot
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import finished
from edgepipe.kernels.requantize import put
from edgepipe.kernels.template import Knobs


def merges(op: QConvOp) -> bool:
    """Whether the taps of a row follow one another without a gap."""
    return op.groups == 1 and op.dilations[1] == 1


class Geometry:
    """Runs and tiles of one op under given knobs; what ``pack`` and ``emit`` must agree on."""

    def __init__(self, op: QConvOp, knobs: Knobs) -> None:
        self.op = op
        self.dot: Dot = dot.named(knobs["dot"], knobs["lanes"], knobs["signed"])
        kh, kw = op.kernel
        self.merged = merges(op)
        ci = op.x.lanes if op.groups == 1 else op.x.c // op.groups
        self.run_bytes = kw * ci if self.merged else ci
        self.runs = kh if self.merged else kh * kw
        self.steps = -(-self.run_bytes // self.dot.step)
        if op.bits == 4:  # two steps share their bytes
            self.steps += self.steps % 2
        self.width: int = knobs["groups"] * self.dot.lanes
        self.channels = op.y.lanes * op.y.blocks
        per_group = self.channels // op.groups
        self.tiles = op.groups * -(-per_group // self.width)
        self.ci = ci

    @property
    def tile_bytes(self) -> int:
        """Packed weights of one tile of channels."""
        return self.runs * self.steps * self.width * self.dot.step * self.op.bits // 8

    def starts(self) -> list[int]:
        """First channel of each tile."""
        return [min(t * self.width, self.channels - self.width) for t in range(self.tiles)]


class Emission:
    """One kernel being emitted: the loops around a register tile, and the tile itself."""

    def __init__(self, op: QConvOp, knobs: Knobs, g: Geometry, buffers: Sequence[Any]) -> None:
        self.op, self.knobs, self.g, self.dot = op, knobs, g, g.dot
        self.source, self.weights, self.bias, self.multipliers, *self.rest = buffers
        #: What is added to the sums of every pixel, where accumulators begin with it.
        self.sums = self.rest.pop() if knobs["offset"] else None
        self.corrects = self.dot.name == "relaxed"
        self.target = self.rest.pop()
        self.pixels, self.groups, self.flat = knobs["pixels"], knobs["groups"], knobs["flat"]
        self.rows, self.columns = (1, op.y.h * op.y.w) if self.flat else (op.y.h, op.y.w)

    def run(self) -> None:
        tiles = -(-self.columns // self.pixels)
        with loop(self.op.y.n) as n:
            if self.dot.name == "relaxed":
                self.input_sums(n)
            with loop(self.g.tiles) as tile, loop(self.rows) as row, loop(tiles) as column_tile:
                self.register_tile(n, tile, row, column_tile)
        zero_border(self.op.y, self.target)

    def input_sums(self, n: Any) -> None:
        """What the offset of the weights adds to every pixel's sums, negated."""
        offset = splat(tirx.const(self.knobs["offset"], "int8"), 16)
        whole = self.g.steps % 4 == 0  # sixteen bytes at once, else four, the same in every lane
        kw = 1 if self.g.merged else self.op.kernel[1]
        with loop(self.rows) as row, loop(self.columns) as column:
            acc = Registers(1, 4, "int32")
            acc[0] = splat(tirx.const(0, "int32"), 4)
            at = (n, 0, row, column)
            with (
                loop(self.op.kernel[0]) as ky,
                loop(kw) as kx,
                loop(self.g.steps // 4 if whole else self.g.steps) as s,
            ):
                place = self.input_offset(at, (0, ky, kx), 0) + s * (16 if whole else 4)
                x = load(self.source, place, 16) if whole else self.dot.operand(self.source, place)
                acc[0] = self.dot.accumulate(acc[0], x, offset)
            total = acc.lane(0, 0)
            for lane in range(1, 4 if whole else 1):
                total = total + acc.lane(0, lane)
            store(self.sums, row * self.columns + column, tirx.const(0, "int32") - total, 1)

    def register_tile(self, n: Any, tile: Any, row: Any, column_tile: Any) -> None:
        """Accumulate ``pixels`` x ``groups`` vectors, then requantise and store."""
        lanes, parts, arch = self.dot.lanes, self.dot.parts, self.knobs["arch"]
        start = minimum(column_tile * self.pixels, self.columns - self.pixels)
        channel = minimum(tile * self.g.width, self.g.channels - self.g.width)
        acc = Registers(self.pixels * self.groups * parts, lanes, "int32")
        zero = splat(tirx.const(0, "int32"), lanes)
        for j in range(self.groups):
            first = load(self.bias, channel + j * lanes, lanes) if parts == 1 else zero
            for i in range(self.pixels):
                value = first
                if self.corrects:
                    correction = self.sums[row * self.columns + start + i]  # type: ignore[index]
                    value = first + splat(correction, lanes)
                for p in range(parts):
                    acc[(i * self.groups + j) * parts + p] = value
        self.accumulate(acc, n, tile, row, start)
        for i in range(self.pixels):
            at = start + i
            pixel = (at // self.op.y.w, at % self.op.y.w) if self.flat else (row, at)
            sums = [self.sum(acc, i, j, channel, (n, *pixel)) for j in range(self.groups)]
            place = (n, *pixel)
            put(self.target, self.op.y, place, channel, sums, self.op.limits, arch, lanes)

    def sum(self, acc: Registers, i: int, j: int, channel: Any, place: Any) -> Any:
        """The float sum of one vector of channels of one pixel."""
        lanes, parts = self.dot.lanes, self.dot.parts
        first = (i * self.groups + j) * parts
        c = channel + j * lanes
        total = self.dot.total([acc[first + p] for p in range(parts)])
        if parts > 1:
            total = total + load(self.bias, c, lanes)
        return finished(self.op, total, self.multipliers, self.rest, place, c, lanes)

    # -- the inner loops ----------------------------------------------------------------------

    def accumulate(self, acc: Registers, *at: Any) -> None:
        """Sum over the runs, in the order in which the weights are packed."""
        kw = 1 if self.g.merged else self.op.kernel[1]
        with loop(self.op.kernel[0]) as ky, loop(kw) as kx:
            run = ky * kw + kx
            chunk = self.chunk()
            with loop(self.g.steps // chunk) as s:
                self.steps(acc, at, (run, ky, kx), s * chunk, chunk)
            if self.g.steps % chunk:
                rest = self.g.steps % chunk
                self.steps(acc, at, (run, ky, kx), self.g.steps - rest, rest)

    def chunk(self) -> int:
        """Steps that are unrolled together."""
        if self.dot.name == "mlal":
            return max(1, int(self.knobs["deep"]))
        return int(self.knobs["unroll"])

    def steps(self, acc: Registers, at: Any, run: Any, step: Any, count: int) -> None:
        """``count`` steps from ``step`` on, unrolled."""
        if self.dot.name == "mlal":
            self.long_steps(acc, at, run, step, count)
            return
        words = None
        if self.dot.name == "sdot" and count == 4:  # sixteen bytes of every pixel at once
            words = Registers(self.pixels, 4, "int32")
            for i in range(self.pixels):
                data = load(self.source, self.input_offset(at, run, i) + step * 4, 16)
                words[i] = dot.reinterpret("int32x4", data)
        for u in range(count):
            operands = [
                self.dot.operand(self.source, self.input_offset(at, run, i) + (step + u) * 4)
                if words is None
                else self.dot.word(words.lane(i, u))
                for i in range(self.pixels)
            ]
            for j in range(self.groups):
                for p in range(self.dot.parts):
                    w = self.weight(at, run, step, u, j, p)
                    for i in range(self.pixels):
                        r = (i * self.groups + j) * self.dot.parts + p
                        acc[r] = self.dot.accumulate(acc[r], operands[i], w)

    def long_steps(self, acc: Registers, at: Any, run: Any, step: Any, count: int) -> None:
        """Steps of sixteen bytes, their products added in int16 before they are widened."""
        inputs = Registers(self.pixels * count, 16, "int8")
        for i in range(self.pixels):
            for u in range(count):
                place = self.input_offset(at, run, i) + (step + u) * 16
                inputs[i * count + u] = load(self.source, place, 16)
        for j in range(self.groups):
            for p in range(4):
                for i in range(self.pixels):
                    pairs = []
                    for u in range(count):
                        w = self.weight(at, run, step, u, j, p)
                        pairs.append((inputs[i * count + u], w))
                    r = (i * self.groups + j) * 4 + p
                    apart = not self.knobs["deep"]
                    acc[r] = dot.multiply_long(self.knobs["arch"], pairs, acc[r], apart)

    def weight(self, at: Any, run: Any, step: Any, u: int, j: int, part: int) -> Any:
        """Weights of one part of step ``step + u``; with 4 bits ``step`` is even."""
        bits, count = self.op.bits, self.dot.part_bytes
        steps = self.g.steps * bits // 8
        local = step + u if bits == 8 else (step * bits // 8) + u // 2
        if bits == 4 and not isinstance(step, int):
            local = tirx.floordiv(step, 2) + u // 2
        number = ((at[1] * self.g.runs + run[0]) * steps + local) * self.groups + j
        codes = load(self.weights, (number * self.dot.parts + part) * count, count)
        if bits == 4:
            codes = dot.nibble(codes, count, u % 2, self.knobs["arch"], self.knobs["offset"])
        return self.dot.weight(codes, self.knobs["offset"])

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
