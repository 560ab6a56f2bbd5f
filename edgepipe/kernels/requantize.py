"""From int32 sums to codes or float32, bit for bit as the interpreter computes it.

1. Every addend is converted to float32 and multiplied; a fence keeps the product from fusing with
   the sum that follows, which would round once instead of twice.
2. Where it could leave ±2^22, the sum is cut to its bounds as a float: they are integers, so the
   order does not matter. Everywhere else saturation does it, later.
3. 1.5 · 2^23 is added, which rounds half to even and leaves the integer in the low bits (AArch64
   rounds and converts in one instruction).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import float32, load, operand_offset, splat, store
from edgepipe.kernels.dot import intrinsic, reinterpret
from edgepipe.kernels.integer_ops import Limits, Residual
from edgepipe.kernels.layout import Blocked

_ROUND, _ROUND_BITS = 12582912.0, 0x4B400000


def scaled(value: Any, multiplier: Any, lanes: int, fence: bool) -> Any:
    """float32(value) · multiplier; both vectors of ``lanes``."""
    product = tirx.Cast(_vector("float32", lanes), value) * multiplier
    if not fence:
        return product
    return intrinsic(_vector("float32", lanes), "arithmetic.fence", product)


def addend(buffer: Any, residual: Residual, place: Any, channel: Any, lanes: int) -> Any:
    """(code − zero) · multiplier of ``lanes`` channels of a residual."""
    codes = load(buffer, operand_offset(residual.layout, *place) + channel, lanes)
    wide = tirx.Cast(_vector("int32", lanes), codes)
    if residual.layout.zero:
        wide = wide - splat(tirx.const(residual.layout.zero, "int32"), lanes)
    return scaled(wide, splat(float32(residual.multiplier), lanes), lanes, fence=True)


def cut(value: Any, low: float, high: float, lanes: int) -> Any:
    """The float sum between its bounds."""
    if low > -math.inf:
        value = tirx.max(value, splat(float32(low), lanes))
    if high < math.inf:
        value = tirx.min(value, splat(float32(high), lanes))
    return value


def rounded(value: Any, zero: int, lanes: int, arch: str) -> Any:
    """Codes as int32 of a float sum within ±2^22 (anything on AArch64, which saturates)."""
    if arch == "aarch64" and lanes == 4:
        integers = intrinsic("int32x4", "aarch64.neon.fcvtns", value)
        return integers + splat(tirx.const(zero, "int32"), lanes) if zero else integers
    held = intrinsic(_vector("float32", lanes), "arithmetic.fence", value)
    moved = held + splat(float32(_ROUND), lanes)
    base = splat(tirx.const(_ROUND_BITS - zero, "int32"), lanes)
    return reinterpret(_vector("int32", lanes), moved) - base


#: Saturating narrowing of int32x4 (pairs of them where two fit) and int16x8, by architecture.
_PACK_SHORTS = {"x86_64": "x86.sse2.packssdw.128", "wasm32": "wasm.narrow.signed"}
_NARROW_SHORTS = {"aarch64": "aarch64.neon.sqxtn", "arm": "arm.neon.vqmovns"}
_PACK_BYTES = {
    ("x86_64", "uint8"): "x86.sse2.packuswb.128",
    ("x86_64", "int8"): "x86.sse2.packsswb.128",
    ("wasm32", "uint8"): "wasm.narrow.unsigned",
    ("wasm32", "int8"): "wasm.narrow.signed",
}


def emit_codes(
    sums: Sequence[Any], y: Blocked, limits: Limits, arch: str, lanes: int, parted: bool = False
) -> Any:
    """Vectors of float sums, ``lanes`` each (a multiple of 4), as one vector of codes.

    Integers beyond int16 and then beyond a byte saturate on the way, which is what bounds at the
    ends of the type ask for; tighter ones are applied to bytes. ``parted`` says that parts of the
    vector are stored apart.
    """
    if not limits.bounded and arch != "aarch64":
        sums = [cut(s, limits.low, limits.high, lanes) for s in sums]
    wide = 8 if arch == "x86_64" and lanes % 8 == 0 else 4
    zero = 0 if arch == "aarch64" else y.zero
    integers = [rounded(p, zero, wide, arch) for s in sums for p in _pieces(s, lanes, wide)]
    words = [p for i in integers for p in _pieces(i, wide, 4)]
    count = len(words)
    pairs = [(words[i], words[min(i + 1, count - 1)]) for i in range(0, count, 2)]
    shorts = [_shorts(*pair, arch, limits.short) for pair in pairs]
    # LLVM would do what is common to the parts for each of them in general registers.
    lowest = arch == "aarch64" and y.zero == -128 and not parted
    if arch == "aarch64" and y.zero and not lowest:
        offset = splat(tirx.const(y.zero, "int16"), 8)
        shorts = [intrinsic("int16x8", "aarch64.neon.sqadd", s, offset) for s in shorts]
    codes = _joined_bytes(shorts, arch, y.dtype, 4 * count, without_sign=lowest)
    if lowest:  # cut to 0…255, which the highest bit moves to −128…127
        codes = tirx.bitwise_xor(codes, splat(tirx.const(-128, "int8"), 4 * count))
    least, most = (0, 255) if y.dtype == "uint8" else (-128, 127)
    low, high = limits.low + y.zero, limits.high + y.zero
    if low > least:
        codes = tirx.max(codes, splat(tirx.const(int(low), y.dtype), 4 * count))
    if high < most:
        codes = tirx.min(codes, splat(tirx.const(int(high), y.dtype), 4 * count))
    return codes


def _pieces(value: Any, lanes: int, width: int) -> list[Any]:
    """A vector in parts of ``width`` lanes."""
    if lanes == width:
        return [value]
    return [
        tirx.Shuffle([value], list(range(first, first + width))) for first in range(0, lanes, width)
    ]


def _shorts(first: Any, second: Any, arch: str, fit: bool) -> Any:
    """Two int32x4 as int16x8, saturated unless they are known to ``fit``."""
    if fit and arch == "aarch64":  # one instruction for both
        halves = [reinterpret("int16x8", v) for v in (first, second)]
        return tirx.Shuffle(halves, list(range(0, 16, 2)))
    if arch in _PACK_SHORTS:
        return intrinsic("int16x8", _PACK_SHORTS[arch], first, second)
    halves = [intrinsic("int16x4", _NARROW_SHORTS[arch], v) for v in (first, second)]
    return tirx.Shuffle(halves, list(range(8)))


def _joined_bytes(
    shorts: Sequence[Any], arch: str, dtype: str, total: int, without_sign: bool = False
) -> Any:
    """int16x8 vectors as ``total`` bytes, saturated, on AArch64 to bytes ``without_sign``."""
    if arch in _NARROW_SHORTS:
        assert dtype == "int8", "Arm stores codes signed"
        name = "aarch64.neon.sqxtun" if without_sign else _NARROW_SHORTS[arch]
        parts, width = [intrinsic("int8x8", name, s) for s in shorts], 8
    else:
        name, count = _PACK_BYTES[arch, dtype], len(shorts)
        pairs = [(shorts[i], shorts[min(i + 1, count - 1)]) for i in range(0, count, 2)]
        parts, width = [intrinsic(f"{dtype}x16", name, a, b) for a, b in pairs], 16
    if len(parts) == 1:
        return parts[0] if width == total else tirx.Shuffle(parts, list(range(total)))
    # Two at a time: what LLVM's shuffles take.
    while len(parts) > 1:
        pairs = [(parts[i], parts[min(i + 1, len(parts) - 1)]) for i in range(0, len(parts), 2)]
        parts = [tirx.Shuffle(list(pair), list(range(2 * width))) for pair in pairs]
        width *= 2
    return parts[0] if width == total else tirx.Shuffle(parts, list(range(total)))


def put(
    target: Any, y: Blocked, place: Any, channel: Any, sums: Sequence[Any],
    limits: Limits, arch: str, lanes: int,
) -> None:  # fmt: skip
    """Store float sums of consecutive channels from ``channel`` on, as ``y`` holds them."""
    n, row, column = place
    if y.dtype == "float32":
        for j, value in enumerate(sums):
            c = channel + j * lanes
            block, lane = (0, c) if y.blocks == 1 else (c // y.lanes, c % y.lanes)
            at = y.offset(n, block, row, column) + lane
            store(target, at, cut(value, limits.low, limits.high, lanes), lanes)
        return
    at = y.offset(n, 0, row, column) + channel
    if lanes % 4 == 0:
        store(target, at, emit_codes(sums, y, limits, arch, lanes), lanes * len(sums))
        return
    for j, value in enumerate(sums):
        inside = cut(value, limits.low, limits.high, lanes)
        code = tirx.Cast(_vector(y.dtype, lanes), rounded(inside, y.zero, lanes, arch))
        store(target, at + j * lanes, code, lanes)


def put_pixels(
    target: Any, y: Blocked, places: Sequence[Any], channel: Any, sums: Sequence[Sequence[Any]],
    limits: Limits, arch: str, lanes: int,
) -> None:  # fmt: skip
    """``put`` for every place; codes are narrowed as many pixels at a time as fill a vector."""
    width = lanes * len(sums[0])
    together = 1 if y.dtype == "float32" or width not in (4, 8) else 16 // width
    for first in range(0, len(places), together):
        part = range(first, min(first + together, len(places)))
        if len(part) == 1:
            put(target, y, places[first], channel, sums[first], limits, arch, lanes)
            continue
        # Three pixels take the room of four.
        filled = [*part, *([part[-1]] * (len(part) % 2))]
        every = [s for i in filled for s in sums[i]]
        codes = emit_codes(every, y, limits, arch, lanes, parted=True)
        words = reinterpret(f"int{8 * width}x{len(filled)}", codes)
        for k, i in enumerate(part):
            n, row, column = places[i]
            word = reinterpret(f"{y.dtype}x{width}", tirx.Shuffle([words], [k]))
            store(target, y.offset(n, 0, row, column) + channel, word, width)


def _vector(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype
