"""Scalar functions as TIR expressions, for every dtype a tensor may have.

float16 is computed in float32 and rounded once. exp, tanh, sigmoid and erf stay TVM intrinsics
(code generation makes vector code of them); the rest are C math functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.lowering.converters.op import cast, const, kind


def is_float(dtype: str) -> bool:
    """Whether ``dtype`` is a floating-point type."""
    return dtype.startswith("float")


def compute_dtype(dtype: str) -> str:
    """The type arithmetic on ``dtype`` runs in: float32 for float16."""
    return "float32" if dtype == "float16" else dtype


def widened(f: Callable[..., Any]) -> Callable[..., Any]:
    """``f`` over scalars, with float16 operands computed in float32 and the result rounded."""

    def wide(*args: Any) -> Any:
        dtype = kind(args[0])
        if dtype != "float16":
            return f(*args)
        return cast(f(*[cast(a, "float32") if kind(a) == dtype else a for a in args]), dtype)

    return wide


def libm(name: str, *args: Any) -> Any:
    """A C math function of float32 or float64."""
    dtype = kind(args[0])
    return tirx.call_pure_extern(dtype, name + ("" if dtype == "float64" else "f"), *args)


def zero(x: Any) -> Any:
    """0 of the type of ``x``."""
    return const(0, kind(x))


def like(value: float, x: Any) -> Any:
    """``value`` in the type of ``x``."""
    return const(value, kind(x))


def lowest(dtype: str) -> Any:
    """The identity of max: −inf, or the smallest integer."""
    return const(-np.inf if is_float(dtype) else int(np.iinfo(dtype).min), dtype)


def highest(dtype: str) -> Any:
    """The identity of min: +inf, or the largest integer."""
    return const(np.inf if is_float(dtype) else int(np.iinfo(dtype).max), dtype)


def is_nan(x: Any) -> Any:
    """Whether ``x`` is NaN. (``x != x`` would be simplified to false.)"""
    return tirx.isnan(cast(x, "float32") if kind(x) == "float16" else x)


def maximum(a: Any, b: Any) -> Any:
    """max that keeps NaN, like NumPy's."""
    return _extreme(tirx.max, a, b, lambda: a > b)


def minimum(a: Any, b: Any) -> Any:
    """min that keeps NaN, like NumPy's."""
    return _extreme(tirx.min, a, b, lambda: a < b)


def _extreme(f: Callable[[Any, Any], Any], a: Any, b: Any, first: Callable[[], Any]) -> Any:
    if not is_float(kind(a)):
        return f(a, b)
    # f compares its operands and takes the second if that fails, as it does for NaN.
    if isinstance(b, tirx.FloatImm):
        return f(b, a)
    if isinstance(a, tirx.FloatImm):
        return f(a, b)
    return tirx.Select(tirx.Or(first(), is_nan(a)), a, b)


def round_even(x: Any) -> Any:
    """Round half to even."""
    return tirx.nearbyint(x)


def safe_divisor(y: Any) -> Any:
    """A divisor that never traps: 0 becomes 1."""
    return tirx.Select(y == zero(y), like(1, y), y)


def divide(x: Any, y: Any) -> Any:
    """ONNX Div: integers truncate toward zero; x/0 is 0 and MIN/−1 wraps instead of trapping."""
    dtype = kind(x)
    if is_float(dtype):
        return x / y
    if dtype.startswith("uint"):
        return tirx.Select(y == zero(y), zero(y), tirx.truncdiv(x, safe_divisor(y)))
    trapping = tirx.Or(y == zero(y), y == like(-1, y))
    quotient = tirx.truncdiv(x, tirx.Select(trapping, like(1, y), y))
    negated = tirx.Select(y == zero(y), zero(y), zero(x) - x)
    return tirx.Select(trapping, negated, quotient)


def _signs_differ(r: Any, y: Any) -> Any:
    """Whether a non-zero remainder and the divisor have different signs."""
    below = tirx.And(r < zero(r), y > zero(y))
    return tirx.Or(below, tirx.And(r > zero(r), y < zero(y)))


def modulo(x: Any, y: Any, fmod: bool) -> Any:
    """ONNX Mod: sign of the divisor (Python), or of the dividend with ``fmod`` (C)."""
    dtype = kind(x)
    if is_float(dtype):
        r = libm("fmod", x, y)
        if fmod:
            return r
        return tirx.Select(_signs_differ(r, y), r + y, r)
    # x mod -1 is 0, but the instruction traps for the most negative x.
    trapping = y == zero(y)
    if not dtype.startswith("uint"):
        trapping = tirx.Or(trapping, y == like(-1, y))
    r = tirx.truncmod(x, tirx.Select(trapping, like(1, y), y))
    if fmod or dtype.startswith("uint"):
        return r
    return tirx.Select(_signs_differ(r, y), r + y, r)


def power(x: Any, y: Any) -> Any:
    """x**y of equal types; integers by float64, exact below 2**53."""
    dtype = kind(x)
    if is_float(dtype):
        return libm("pow", x, y)
    return cast(libm("pow", cast(x, "float64"), cast(y, "float64")), dtype)


def convert(x: Any, dtype: str) -> Any:
    """ONNX Cast: to bool is ``!= 0``; float to integer truncates."""
    own = kind(x)
    if own == dtype:
        return x
    if dtype == "bool":
        return x != zero(x)
    if own == "bool":
        return tirx.Select(x, const(1, dtype), const(0, dtype))
    if own == "float16" and dtype != "float32":
        return tirx.Cast(dtype, tirx.Cast("float32", x))
    if dtype == "float16" and own != "float32":
        return tirx.Cast("float16", tirx.Cast("float32", x))
    return tirx.Cast(dtype, x)


def saturate(x: Any, dtype: str) -> Any:
    """An integer-valued float clamped to the range of an 8- or 16-bit integer type."""
    info = np.iinfo(dtype)
    bounded = tirx.min(tirx.max(x, like(float(info.min), x)), like(float(info.max), x))
    return tirx.Cast(dtype, bounded)
