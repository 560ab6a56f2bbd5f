"""Products of pairs of halves, two multiply-adds an instruction (compute capability 5.3 and later,
6.1 apart).

A pair is two neighbouring channels, in one 32-bit word of weights and of inputs; its sum has the
even channels in one half and the odd ones in the other. Halves carry 11 bits: sums of them are kept
for the few products of a step only (``settle``) and then added to float32 totals. The functions
that are called here are in ``codegen.cuda.pairs``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import float32, load, splat, store
from edgepipe.kernels.cuda.threads import LANES
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target

#: Halves of a pair, and pairs of a vector of channels.
PAIR, WORDS = 2, LANES // 2
#: Codes enter as halves of at most 1: their sums are as far from 65504 as those of weights.
CODE_SCALE = 128.0


def faster(target: Target) -> bool:
    """Whether ``target`` multiplies halves in pairs faster than float32."""
    assert target.cuda is not None
    return target.cuda.peak_gflops_f16 > target.cuda.peak_gflops_f32


def readable(format: WeightFormat) -> bool:
    """Whether weights in ``format`` become pairs of halves without loss."""
    return format.kind in ("float16", "int8") and not format.group


def unfit(op: Any, target: Target) -> str | None:
    """Why a convolution or a transposed one is not computed in pairs of halves on ``target``: ""
    where that is no question."""
    if op.x.dtype != "float16" or not faster(target):
        return ""
    if op.x.lanes not in (1, LANES) or op.y.lanes != LANES:
        return "not in NCHW4c"
    return None if readable(op.weights) else ""


def fma(a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` of both halves."""
    return tirx.call_pure_extern("uint32", "pair_fma", a, b, c)


def low(word: Any) -> Any:
    """The first half as float32."""
    return tirx.call_pure_extern("float32", "pair_low", word)


def high(word: Any) -> Any:
    """The second half as float32."""
    return tirx.call_pure_extern("float32", "pair_high", word)


def settle(total: Any, word: Any) -> Any:
    """A float32 total and both halves of a sum."""
    return total + (low(word) + high(word))


def joined(first: Any, second: Any) -> Any:
    """Two halves as one word."""
    bits = [tirx.Cast("uint32", tirx.reinterpret("uint16", half)) for half in (first, second)]
    return bits[0] | (bits[1] << tirx.const(16, "uint32"))


def words(buffer: Any, offset: Any) -> Any:
    """Four consecutive halves or codes as two words; codes times 1 / ``CODE_SCALE``."""
    value = load(buffer, offset, LANES)
    if str(buffer.dtype) == "int8":
        wide = tirx.Cast(f"float32x{LANES}", value) * splat(float32(1 / CODE_SCALE), LANES)
        value = tirx.Cast(f"float16x{LANES}", wide)
    return tirx.reinterpret(f"uint32x{WORDS}", value)


def unpacked(value: Any) -> Any:
    """A local buffer with two words, as of ``words``."""
    held = T.alloc_buffer((WORDS,), "uint32", scope="local")
    store(held, 0, value, WORDS)
    return held


def scales(format: WeightFormat, vectors: list[np.ndarray]) -> list[np.ndarray]:
    """Vectors behind weights, with what ``words`` took from codes given back to their scales."""
    if not format.coded:
        return vectors
    first, *rest = vectors
    return [np.asarray(first, np.float32) * np.float32(CODE_SCALE), *rest]
