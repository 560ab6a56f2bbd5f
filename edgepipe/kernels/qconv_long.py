"""Sums over steps of sixteen bytes, for ARM without dot products; see ``qconv``.

Two halves of products are added in int16 where they fit before they are widened: of 8 bits one or
two, of 4 bits (``_SHORT``) many. Each of the four parts of an accumulator has four sums of a
channel, which are added in the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tvm import tirx

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, load, loop, minimum, splat

if TYPE_CHECKING:
    from edgepipe.kernels.qconv_tile import Emission

#: Steps whose products of 4-bit weights are added in int16, an even number: with one more they are
#: 30 of at most 8 · 128.
_SHORT = 14


class LongSums:
    """What one run adds to the accumulators ``acc`` of a register tile at ``at``."""

    def __init__(self, tile: Emission, acc: Registers, at: Any, run: Any) -> None:
        self.tile, self.acc, self.at, self.run = tile, acc, at, run
        self.g, self.pixels, self.groups = tile.g, tile.pixels, tile.groups
        self.arch, self.deep = tile.knobs["arch"], int(tile.knobs["deep"])

    def all_steps(self) -> None:
        """All steps of the run."""
        if self.tile.op.bits == 4:
            whole, rest = divmod(self.g.steps - self.g.whole_last, _SHORT)
            if self.g.whole_last:  # it joins the steps before it
                whole, rest = (whole, rest + 1) if rest or not whole else (whole - 1, _SHORT + 1)
            with loop(whole) as part:
                self.short_sums(part * _SHORT, _SHORT)
            if rest:
                self.short_sums(self.g.steps - rest, rest)
            return
        chunk, count = max(1, self.deep), self.g.steps - self.g.halved
        with loop(count // chunk) as s:
            self.long_steps(s * chunk, chunk)
        if rest := count % chunk:
            self.long_steps(count - rest, rest)
        if self.g.halved:
            self.half_step()

    def shared_step(self) -> None:
        """One step over several short rows of taps; those that are missing weigh zero."""
        word, rows, run = self.g.word, self.tile.op.kernel[0], self.run[0]
        codes = []
        for i in range(self.pixels):
            parts = []
            for u in range(16 // word):
                ky = minimum(run * (16 // word) + u, rows - 1)
                parts.append(
                    load(self.tile.source, self.tile.input_offset(self.at, (run, ky, 0), i), word)
                )
            codes.append([dot.joined(parts, word)])
        self.multiply(codes, lambda u, j, p: self.weight(0, u, j, p))

    def half_step(self) -> None:
        """The last eight bytes of a run."""
        done = (self.g.steps - 1) * 16
        base = (self.at[1] * self.g.runs + self.run[0]) * self.g.run_stride + done * self.g.width
        codes = [[load(self.tile.source, self.place(i) + done, 8)] for i in range(self.pixels)]

        def weight(u: int, j: int, p: int) -> Any:
            del u
            return load(self.tile.weights, base + (j * 4 + p) * 8, 8)

        self.multiply(codes, weight, 8)

    def multiply(self, codes: Any, weight: Any, width: int = 16) -> None:
        """Add products of ``codes[pixel][u]`` and ``weight(u, group, part)``."""
        acc, apart = self.acc, not self.deep
        for j in range(self.groups):
            for p in range(4):
                for i in range(self.pixels):
                    pairs = [(x, weight(u, j, p)) for u, x in enumerate(codes[i])]
                    r = (i * self.groups + j) * 4 + p
                    acc[r] = dot.multiply_long(self.arch, pairs, acc[r], apart, width)

    def long_steps(self, step: Any, count: int) -> None:
        """Steps of sixteen bytes, their products added in int16 before they are widened."""
        inputs = Registers(self.pixels * count, 16, "int8")
        for i in range(self.pixels):
            for u in range(count):
                place = self.place(i) + (step + u) * 16
                inputs[i * count + u] = load(self.tile.source, place, 16)
        codes = [[inputs[i * count + u] for u in range(count)] for i in range(self.pixels)]
        self.multiply(codes, lambda u, j, p: self.weight(step, u, j, p))

    def short_sums(self, step: Any, count: int) -> None:
        """``count`` steps from ``step`` on, an even one, in int16: weights of four bits, of which
        so many products fit."""
        acc = self.acc
        short = Registers(acc.count, 8, "int16")
        for r in range(acc.count):
            short[r] = splat(tirx.const(0, "int16"), 8)

        def add(first: Any, together: int) -> None:
            inputs = Registers(together * self.pixels, 16, "int8")
            for i in range(self.pixels):
                for u in range(together):
                    place = self.place(i) + (first + u) * 16
                    inputs[together * i + u] = load(self.tile.source, place, 16)
            for j in range(self.groups):
                for p in range(4):
                    for u in range(together):
                        w = self.weight(first, u, j, p, whole=together == 1)
                        for i in range(self.pixels):
                            r = (i * self.groups + j) * 4 + p
                            short[r] = dot.add_short(short[r], inputs[together * i + u], w)

        with loop(count // 2) as pair:
            add(step + 2 * pair, 2)
        if count % 2:
            add(step + count - 1, 1)
        for r in range(acc.count):
            acc[r] = dot.widened(self.arch, acc[r], short[r])

    def place(self, pixel: int) -> Any:
        """The first byte of the run for ``pixel``."""
        return self.tile.input_offset(self.at, self.run, pixel)

    def weight(self, step: Any, u: int, j: int, part: int, whole: bool = False) -> Any:
        """Weights of one part of step ``step + u``."""
        return self.tile.weight(self.at, self.run, step, u, j, part, whole)
