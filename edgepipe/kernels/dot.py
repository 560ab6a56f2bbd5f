"""How a target sums products of 8-bit integers, behind one interface.

A ``Dot`` computes ``lanes`` output channels at a time. One *step* takes ``step`` consecutive
input bytes of a pixel and ``lanes · step`` weight bytes, packed ``[lanes][step]``, into ``parts``
vector registers of int32 partial sums; ``total`` adds the parts up. All are exact for weights
within the limit that the caller checks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import Registers, load, splat
from edgepipe.target import Target

#: What is added to stored weights, by bits, where the instruction's operand has no sign: that of
#: relaxed dot products has seven bits.
UNSIGNED_OFFSET = {8: 64, 4: 8}


def intrinsic(dtype: str, name: str, *args: Any) -> Any:
    """A call of an LLVM intrinsic without side effects."""
    return tirx.call_llvm_pure_intrin(dtype, f"llvm.{name}", *args)


def reinterpret(dtype: str, value: Any) -> Any:
    """The same bits as another type."""
    return tirx.reinterpret(dtype, value)


def half(value: Any, lanes: int, which: int) -> Any:
    """Lower (0) or upper (1) half of a vector of ``lanes``."""
    first = which * (lanes // 2)
    return tirx.Shuffle([value], list(range(first, first + lanes // 2)))


def joined(parts: Sequence[Any], width: int) -> Any:
    """Vectors of ``width``, a power of two of them, as one."""
    while len(parts) > 1:  # two at a time: what LLVM's shuffles take
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [tirx.Shuffle([a, b], list(range(2 * width))) for a, b in pairs]
        width *= 2
    return parts[0]


#: VPMADDUBSW and VPMADDWD by lanes of int32.
_MADDUBS = {
    4: ("x86.ssse3.pmadd.ub.sw.128", "x86.sse2.pmadd.wd"),
    8: ("x86.avx2.pmadd.ub.sw", "x86.avx2.pmadd.wd"),
}


@dataclass(frozen=True)
class Dot:
    """One way of summing products; see the module. ``signed`` says how activations are read."""

    name: str
    lanes: int
    step: int
    parts: int
    signed: bool

    def operand(self, buffer: Any, offset: Any) -> Any:
        """The input bytes at ``offset``, as ``accumulate`` wants them."""
        kind = "int8" if self.signed else "uint8"
        if self.step == 16:
            return load(buffer, offset, 16)
        word = reinterpret("int32", load(buffer, offset, 4))
        if self.name == "pairs":
            count = 4 * self.lanes // 4
            wide = reinterpret(f"{kind}x{2 * self.lanes}", splat(word, count // 2))
            return tirx.Cast(f"int16x{2 * self.lanes}", wide)
        return reinterpret(f"int8x{4 * self.lanes}", splat(word, self.lanes))

    def word(self, lane: Any) -> Any:
        """``operand`` of four bytes that are an int32 in a register already (by element)."""
        return reinterpret(f"int8x{4 * self.lanes}", splat(lane, self.lanes))

    @property
    def part_bytes(self) -> int:
        """Weight bytes of one part of a step."""
        return self.lanes * self.step // self.parts

    def weight(self, codes: Any, unsigned: bool = False) -> Any:
        """``part_bytes`` weights (int8, or bytes without sign) as ``accumulate`` wants them."""
        if self.name != "pairs":
            return codes
        if unsigned:
            codes = reinterpret(f"uint8x{self.part_bytes}", codes)
        return tirx.Cast(f"int16x{self.part_bytes}", codes)

    def accumulate(self, acc: Any, x: Any, w: Any) -> Any:
        """``acc`` plus the products of one step."""
        n = self.lanes
        if self.name == "vnni":
            return intrinsic(f"int32x{n}", f"x86.avx512.vpdpbusd.{32 * n}", acc, x, w)
        if self.name == "maddubs":
            bytes_, shorts = _MADDUBS[n]
            pairs = intrinsic(f"int16x{2 * n}", bytes_, x, w)
            ones = splat(tirx.const(1, "int16"), 2 * n)
            return acc + intrinsic(f"int32x{n}", shorts, pairs, ones)
        if self.name == "sdot":
            return intrinsic("int32x4", "aarch64.neon.sdot", acc, w, x)
        if self.name == "relaxed":
            return intrinsic("int32x4", "wasm.relaxed.dot.i8x16.i7x16.add.signed", x, w, acc)
        if n == 8:
            return acc + intrinsic("int32x8", "x86.avx2.pmadd.wd", x, w)
        return acc + intrinsic("int32x4", "wasm.dot", x, w)

    def total(self, parts: Sequence[Any]) -> Any:
        """int32 per channel, from its partial sums."""
        if self.parts == 1:
            return parts[0]
        if self.parts == 2:
            width = self.lanes
            even = tirx.Shuffle(list(parts), list(range(0, 2 * width, 2)))
            return even + tirx.Shuffle(list(parts), list(range(1, 2 * width, 2)))
        first, second = (_pairwise(parts[i], parts[i + 1]) for i in (0, 2))
        return _pairwise(first, second)


def _pairwise(a: Any, b: Any) -> Any:
    """Sums of neighbours of two int32x4 (ADDP)."""
    even, odd = (tirx.Shuffle([a, b], [s, s + 2, s + 4, s + 6]) for s in (0, 1))
    return even + odd


def nibble(packed: Any, count: int, which: int, arch: str, offset: int) -> Any:
    """Weights of four bits from bytes that hold two, as int8: the lower (0) or upper (1) ones.

    With ``offset`` they were stored without sign and stay so.
    """

    def const(value: int) -> Any:
        return splat(tirx.const(value, "int8"), count)

    if arch in ("aarch64", "arm"):  # shifts of bytes, with sign
        if which == 0:
            packed = tirx.shift_left(packed, const(4))
        return tirx.shift_right(packed, const(4))
    if which:
        bytes_ = tirx.shift_right(
            reinterpret(f"uint8x{count}", packed), splat(tirx.const(4, "uint8"), count)
        )
        value = reinterpret(f"int8x{count}", bytes_)
    else:
        value = tirx.bitwise_and(packed, const(15))
    return value if offset else value - const(8)


def multiply_long(
    arch: str, pairs: Sequence[tuple[Any, Any]], acc: Any, apart: bool = False, width: int = 16
) -> Any:
    """``acc`` (int32x4) plus the products of int8 vectors of 16 or 8, summed in int16 first.

    Exact while ``len(pairs)`` products of one lane, twice, fit int16; ``apart`` widens every
    product by itself, which is exact for all of int8.
    """
    total: Any = None
    for x, w in pairs:
        for which in range(width // 8):
            parts = (x, w) if width == 8 else (half(v, 16, which) for v in (x, w))
            a, b = (tirx.Cast("int16x8", v) for v in parts)
            if apart:
                acc = widened(arch, acc, a * b)
            else:
                total = a * b if total is None else total + a * b
    return acc if apart else widened(arch, acc, total)


def add_short(total: Any, x: Any, w: Any) -> Any:
    """``total`` (int16x8) plus the products of both halves of two int8x16."""
    for which in range(2):
        a, b = (tirx.Cast("int16x8", half(v, 16, which)) for v in (x, w))
        total = total + a * b
    return total


def add_long(arch: str, acc: Any, four: Any, scalar: Any) -> Any:
    """``acc`` (int32x4) plus int16x4 times an element of a register (SMLAL, VMLAL)."""
    name = "arm.neon.vmulls" if arch == "arm" else "aarch64.neon.smull"
    return acc + intrinsic("int32x4", name, four, splat(scalar, 4))


def widened(arch: str, acc: Any, products: Any) -> Any:
    """``acc`` plus sums of neighbours of int16x8."""
    if arch == "arm":
        return intrinsic("int32x4", "arm.neon.vpadals", acc, products)
    return acc + intrinsic("int32x4", "aarch64.neon.saddlp", products)


_DOTS = {
    "sdot": Dot("sdot", 4, 4, 1, True),
    "mlal": Dot("mlal", 4, 16, 4, True),
    "relaxed": Dot("relaxed", 4, 4, 1, True),
    "maddubs": Dot("maddubs", 8, 4, 1, False),
    "pairs": Dot("pairs", 4, 4, 2, True),
}


def choose(target: Target, limit: int, channels: int) -> Dot:
    """The fastest exact way for weights up to ``limit`` in magnitude; ``channels`` of output."""
    name = target.integer.dot
    if name == "vnni":
        wide = target.simd.lanes_f32 == 16 and channels % 16 == 0
        return Dot("vnni", 16 if wide else 8, 4, 1, False)
    if name == "maddubs" and limit > target.integer.weight_limit:
        return Dot("pairs", 8, 4, 2, False)
    if name == "relaxed":  # the plain module of the bundle; see ``variant``
        return _DOTS["pairs"]
    return _DOTS[name]


def named(name: str, lanes: int, signed: bool) -> Dot:
    """The ``Dot`` that knobs describe."""
    if name in ("vnni", "pairs", "maddubs"):
        return Dot(name, lanes, 4, 2 if name == "pairs" else 1, signed)
    return _DOTS[name]


__all__ = ["UNSIGNED_OFFSET", "Dot", "Registers", "choose", "intrinsic", "multiply_long", "named"]
