"""Weights of a register tile while a kernel is emitted: from packed rows to float vectors.

What is unpacked goes into a local buffer with constant indices, which LLVM keeps in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import sym, tirx

from edgepipe.kernels.builder import Registers, float32, fma, load, splat, store
from edgepipe.kernels.weights import NIBBLES, WeightFormat
from edgepipe.target import Target

#: Elements converted at once: what fills a 16-byte load, at most.
_CHUNK = {"float16": 8, "int8": 16}


def half_conversion(target: Target) -> str:
    """How float16 becomes float32: ``convert`` by instruction, ``neon`` by Arm's, or ``bits``.

    LLVM's WebAssembly back end does not terminate on vectors of half, and converts them one by
    one on 32-bit Arm, where only the intrinsic names the vector instruction.
    """
    if target.kind == "wasm":
        return "bits"
    return "neon" if target.arch == "arm" else "convert"


def half_to_float(bits: Any, lanes: int, conversion: str) -> Any:
    """float32 value of float16 ``bits`` (int16), exact for every finite half.

    From bits: exponent and mantissa, moved to where float32 has them, are a float32 too small by
    2^112 (the difference of the biases), subnormals included; what the shift leaves between sign
    and exponent is copies of the sign.
    """
    if conversion == "neon" and lanes == 4:
        return tirx.call_llvm_pure_intrin("float32x4", "llvm.arm.neon.vcvthf2fp", bits)
    if conversion != "bits":
        return tirx.Cast(_typed("float32", lanes), tirx.reinterpret(_typed("float16", lanes), bits))
    wide = tirx.Cast(_typed("int32", lanes), bits) << _int32(13, lanes)
    number = tirx.reinterpret(_typed("float32", lanes), wide & _int32(-0x70000001, lanes))
    return number * splat(float32(2.0**112), lanes)


def _typed(base: str, lanes: int) -> str:
    return f"{base}x{lanes}" if lanes > 1 else base


def _int32(value: int, lanes: int) -> Any:
    return splat(tirx.const(value, "int32"), lanes)


def _remainder(index: Any, divisor: int) -> Any:
    """``index % divisor``, as an int where it is the same in every iteration."""
    if isinstance(index, int):
        return index % divisor
    found = sym.Analyzer().simplify(tirx.floormod(index, divisor))
    return int(found) if isinstance(found, tirx.IntImm) else found


class TileWeights:
    """Reads the weights of one kernel: ``buffers`` as ``WeightFormat.arguments`` lists them.

    A row is ``blocks`` vectors of ``lanes``. ``conversion`` is what ``half_conversion`` says.
    """

    def __init__(
        self,
        format: WeightFormat,
        buffers: Sequence[Any],
        shape: tuple[int, int],
        conversion: str,
        fused: bool,
    ) -> None:
        self.format, self.conversion, self.fused = format, conversion, fused
        self.buffer, self.factors = (*buffers, None)[:2]
        self.blocks, self.lanes = shape
        self.width = self.blocks * self.lanes

    def row(self, first: Any, offset: int = 0) -> list[Any]:
        """The vectors of row ``first + offset``, without scale.

        Rows that are read together share ``first``: 4-bit codes share words.
        """
        if self.format.kind == "int4":
            return self._nibbles(first, offset)
        base = (first + offset) * self.width
        if self.format.plain:
            return [
                load(self.buffer, base + j * self.lanes, self.lanes) for j in range(self.blocks)
            ]
        vectors = Registers(self.blocks, self.lanes)
        limit = 4 if self.conversion == "neon" else _CHUNK[self.format.kind]
        chunk = min(limit, self.width & -self.width)  # the largest power of two that divides it
        for start in range(0, self.width, chunk):
            raw = load(self.buffer, base + start, chunk)
            store(vectors.buffer, start, self._floats(raw, chunk), chunk)
        return [vectors[j] for j in range(self.blocks)]

    def _floats(self, raw: Any, lanes: int) -> Any:
        if self.format.kind == "float16":
            return half_to_float(raw, lanes, self.conversion)
        # Named in two steps: some back ends have no direct conversion.
        return tirx.Cast(_typed("float32", lanes), tirx.Cast(_typed("int32", lanes), raw))

    def _nibbles(self, first: Any, offset: int) -> list[Any]:
        """One row out of the words of eight: up to the sign, and down again."""
        words = [
            load(self.buffer, (first + offset) // NIBBLES * self.width + j * self.lanes, self.lanes)
            for j in range(self.blocks)
        ]
        vectors = Registers(self.blocks, self.lanes)
        for j, word in enumerate(words):
            code = self._raised(word, first, offset) >> _int32(28, self.lanes)
            vectors[j] = tirx.Cast(_typed("float32", self.lanes), code)
        return [vectors[j] for j in range(self.blocks)]

    def _raised(self, word: Any, first: Any, offset: int) -> Any:
        """``word`` shifted so that the nibble of row ``first + offset`` is on top."""
        place = _remainder(first + offset, NIBBLES)
        if isinstance(place, int):
            return word << _int32(28 - 4 * place, self.lanes)
        if offset < NIBBLES // 2 and _remainder(first, NIBBLES // 2) == 0:
            # Four rows lie in one half of the word: choosing it is the same for all of them.
            half = tirx.Cast("int32", first) // 4 % 2
            chosen = word << splat(tirx.const(16, "int32") - half * 16, self.lanes)
            return chosen << _int32(12 - 4 * offset, self.lanes)
        return word << splat(tirx.const(28, "int32") - tirx.Cast("int32", place) * 4, self.lanes)

    def start(self, bias: Any) -> Any:
        """What an accumulator begins with; ``bias`` is None for none."""
        if bias is None or self.format.coded:
            return splat(float32(0), self.lanes)
        return bias

    def end_group(self, acc: Registers, number: Any) -> None:
        """Express all accumulators in units of what follows group ``number`` (a row of factors)."""
        for r in range(acc.count):
            at = number * self.width + r % self.blocks * self.lanes
            acc[r] = acc[r] * load(self.factors, at, self.lanes)

    def finished(self, value: Any, channel: Any, bias: Any) -> Any:
        """A complete accumulator whose lane 0 is output ``channel``: its scale and its bias."""
        if not self.format.coded:
            return value
        if self.format.group:
            return value if bias is None else value + bias
        scale = load(self.factors, channel, self.lanes)
        if bias is None:
            return value * scale
        return fma(value, scale, bias, self.lanes, self.fused)
