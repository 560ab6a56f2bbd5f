"""Products of codes of eight bits by relaxed dot products, one of whose factors has seven.

Weights within 63 are the factor of eight bits, and codes the other one. Engines read that without
sign (x86, whose instruction takes eight bits then) or with it (Arm), and decide once for all
(https://github.com/WebAssembly/relaxed-simd). So a kernel asks first, by a product that tells:
codes exclusive or the *bit* that it finds, -128 or 0, are 128 more or themselves. No sum of two
products leaves int16, which VPMADDUBSW has.

Other weights are taken apart: magnitudes are the factor of seven bits, and codes are complemented,
-x - 1, where a weight is negative.

Either way a sum is exact but for an *excess*, which depends on its weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, splat

_DOT = dot.named("relaxed", 4, True)
#: Largest magnitude of weights that pairs of products with 255 leave room for in int16.
_LIMIT = 63


def whole(limit: int) -> bool:
    """Whether weights of this magnitude stay as they are."""
    return limit <= _LIMIT


def excess(weights: np.ndarray, limit: int) -> np.ndarray:
    """int32 of weights ``[..., n]``: what sums over the last axis have too much, of weights within
    63 where the engine reads codes without sign."""
    parts = weights if whole(limit) else np.minimum(weights, 0)
    sums: np.ndarray = parts.sum(-1, dtype=np.int32)
    return sums * np.int32(128) if whole(limit) else sums


class Factors:
    """How codes and weights of one kernel are multiplied; ``limit`` is the largest magnitude."""

    def __init__(self, limit: int) -> None:
        self._bit = Registers(1, 16, "int8") if whole(limit) else None
        #: Vectors that ``weights`` makes of one.
        self.vectors = 1 if whole(limit) else 2

    def ask(self) -> None:
        """Find the bit, before anything else here is used."""
        if self._bit is None:
            return
        ones, bits = (splat(tirx.const(value, "int8"), 16) for value in (1, -128))
        none = splat(tirx.const(0, "int32"), 4)
        told = _DOT.accumulate(none, ones, bits)
        mask = tirx.Select(told > none, splat(tirx.const(-1, "int32"), 4), none)
        self._bit[0] = tirx.bitwise_and(dot.reinterpret("int8x16", mask), bits)

    def codes(self, x: Any, lanes: int = 16) -> Any:
        """What is made of codes once, int8 of 4 or 16 ``lanes``."""
        if self._bit is None:
            return x
        bit = self._bit[0]
        return tirx.bitwise_xor(x, bit if lanes == 16 else tirx.Shuffle([bit], list(range(lanes))))

    def weights(self, w: Any) -> list[Any]:
        """What is made of weights once, int8x16: one vector, or two."""
        if self._bit is not None:
            return [w]
        zero = splat(tirx.const(0, "int8"), 16)
        # LLVM would make a comparison with a zero that it sees a shift of bytes, which takes five
        # instructions on x86.
        hidden = splat(tirx.const(0.0, "float32"), 4)
        hidden = dot.intrinsic("float32x4", "arithmetic.fence", hidden)
        below = w < dot.reinterpret("int8x16", hidden)
        return [tirx.max(w, zero - w), tirx.Select(below, splat(tirx.const(-1, "int8"), 16), zero)]

    def accumulate(self, acc: Any, x: Any, made: Sequence[Any]) -> Any:
        """``acc``, int32x4, plus products of what ``codes`` and ``weights`` made."""
        if self._bit is not None:
            return _DOT.accumulate(acc, made[0], x)
        size, negative = made
        return _DOT.accumulate(acc, tirx.bitwise_xor(x, negative), size)

    def excess(self, made: Sequence[Any]) -> Any:
        """int32x4: what sums have too much of the products with these weights."""
        operands = (made[0], self._bit[0]) if self._bit is not None else (made[1], made[0])
        return _DOT.accumulate(splat(tirx.const(0, "int32"), 4), *operands)

    def stored(self, value: Any) -> Any:
        """The excess of this engine, int32, of one that ``excess`` stored."""
        if self._bit is None:
            return value
        bits = tirx.Shuffle([dot.reinterpret("int32x4", self._bit[0])], [0])
        return tirx.bitwise_and(value, tirx.shift_right(bits, tirx.const(31, "int32")))
