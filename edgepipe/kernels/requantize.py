"""From int32 sums to codes or float32, bit for bit as the interpreter computes it.

1. Every addend is converted to float32 and multiplied; a fence keeps the product from fusing with
   the sum that follows, which would round once instead of twice.
2. The sum is cut to its bounds as a float: they are integers, so the order does not matter, and
   what follows cannot overflow.
3. 1.5 · 2^23 is added, which rounds half to even and leaves the integer in the low bits (AArch64
   has one instruction for it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import Registers, float32, load, operand_offset, splat, store
from edgepipe.kernels.dot import intrinsic, reinterpret
from edgepipe.kernels.integer_ops import Residual
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
    """Codes as int32 of a float sum that has been cut to them."""
    if arch == "aarch64":
        integers = intrinsic(_vector("int32", lanes), "aarch64.neon.fcvtns", value)
        return integers + splat(tirx.const(zero, "int32"), lanes) if zero else integers
    moved = value + splat(float32(_ROUND), lanes)
    base = splat(tirx.const(_ROUND_BITS - zero, "int32"), lanes)
    return reinterpret(_vector("int32", lanes), moved) - base


def emit_codes(
    sums: Sequence[Any], y: Blocked, low: float, high: float, arch: str, lanes: int
) -> Any:
    """Vectors of float sums, ``lanes`` each, as one vector of codes of the type of ``y``."""
    parts = [rounded(cut(s, low, high, lanes), y.zero, lanes, arch) for s in sums]
    return narrow(parts, lanes, y.dtype)


def narrow(parts: Sequence[Any], lanes: int, dtype: str) -> Any:
    """int32 vectors whose values fit ``dtype`` as one vector of it."""
    total = lanes * len(parts)
    if len(parts) > 1:
        held = Registers(len(parts), lanes, "int32")
        for i, part in enumerate(parts):
            held[i] = part
        return tirx.Cast(_vector(dtype, total), load(held.buffer, 0, total))
    return tirx.Cast(_vector(dtype, total), parts[0])


def put(
    target: Any, y: Blocked, place: Any, channel: Any, sums: Sequence[Any],
    low: float, high: float, arch: str, lanes: int,
) -> None:  # fmt: skip
    """Store float sums of consecutive channels from ``channel`` on, as ``y`` holds them."""
    n, row, column = place
    if y.dtype == "float32":
        for j, value in enumerate(sums):
            c = channel + j * lanes
            block, lane = (0, c) if y.blocks == 1 else (c // y.lanes, c % y.lanes)
            at = y.offset(n, block, row, column) + lane
            store(target, at, cut(value, low, high, lanes), lanes)
        return
    codes = emit_codes(sums, y, low, high, arch, lanes)
    store(target, y.offset(n, 0, row, column) + channel, codes, lanes * len(sums))


def _vector(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype
