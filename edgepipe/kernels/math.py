"""exp, sigmoid, tanh and erf as vectorisable float32 expressions (at most a few units in the
last place), so that no kernel calls a scalar math library in its inner loop.

The polynomials are our own least-maximum fits; each function is checked against float64 over
its whole range in the tests. Expressions take and return ``float32`` with ``lanes`` lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.builder import float32, splat

_LOG2_E = 1.4426950408889634
# ln 2 in two parts: the first is exact in 15 bits, so n * _LN2_HIGH is exact for |n| < 512.
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.42860682030941723212e-6
# 1.5 * 2^23: adding it rounds to the nearest integer and leaves that integer in the low bits.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000

_TANH = (-0.33333298563957214, 0.13332270085811615, -0.05385585501790047,
         0.02131400816142559, -0.007425214163959026, 0.0015930377412587404)  # fmt: skip
_ERF = (1.1283791065216064, -0.3761262595653534, 0.11283600330352783, -0.026854444295167923,
        0.005189535208046436, -0.0008020841050893068, 7.889119297033176e-05)  # fmt: skip
_LOG_ERFC = (0.00020435811893548816, -1.129661202430725, -0.633039653301239,
             -0.10863897204399109, 0.025373535230755806, -0.0042823730036616325,
             0.00046378507977351546, -2.5314320737379603e-05,
             2.512919365926791e-07)  # fmt: skip


def _dtype(base: str, lanes: int) -> str:
    return f"{base}x{lanes}" if lanes > 1 else base


def bind(value: Any, lanes: int, use: Callable[[Any], Any]) -> Any:
    """``let v = value in use(v)``: keeps the expression a tree of linear size."""
    var = tirx.Var("t", _dtype("float32", lanes))
    return tirx.Let(var, value, use(var))


def polynomial(x: Any, coefficients: Sequence[float], lanes: int) -> Any:
    """Horner's rule, lowest coefficient first."""
    result = splat(float32(coefficients[-1]), lanes)
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + splat(float32(coefficient), lanes)
    return result


def exp(x: Any, lanes: int) -> Any:
    """e**x with overflow to infinity, underflow to zero and NaN kept.

    x = n ln 2 + r, |r| <= ln 2 / 2; the Taylor polynomial of degree 7 for e**r; 2**n as two
    factors so that both ends of the range are reached.
    """

    def const(value: float) -> Any:
        return splat(float32(value), lanes)

    def integer(value: int) -> Any:
        return splat(tirx.const(value, "int32"), lanes)

    def power_of_two(n: Any) -> Any:
        return tirx.reinterpret(_dtype("float32", lanes), (n + integer(127)) << integer(23))

    def scaled(x: Any, shifted: Any) -> Any:
        n = shifted - const(_ROUND)

        def finish(r: Any) -> Any:
            p = polynomial(r, (1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040), lanes)
            bits = tirx.reinterpret(_dtype("int32", lanes), shifted) - integer(_ROUND_BITS)
            half = bits >> integer(1)
            return p * power_of_two(half) * power_of_two(bits - half)

        return bind(x - n * const(_LN2_HIGH) - n * const(_LN2_LOW), lanes, finish)

    def rounded(x: Any) -> Any:
        shifted = tirx.max(const(-150), tirx.min(const(128), x * const(_LOG2_E))) + const(_ROUND)
        return bind(shifted, lanes, lambda s: scaled(x, s))

    # max(constant, x) keeps a NaN in x: the comparison is false and selects the second operand.
    return bind(tirx.max(const(-104), x), lanes, rounded)


def sigmoid(x: Any, lanes: int) -> Any:
    """1 / (1 + e**-x)."""
    one = splat(float32(1), lanes)
    return one / (one + exp(splat(float32(0), lanes) - x, lanes))


def tanh(x: Any, lanes: int) -> Any:
    """An odd polynomial below 0.8, 1 - 2 / (e**2|x| + 1) above."""

    def const(value: float) -> Any:
        return splat(float32(value), lanes)

    def both(x: Any) -> Any:
        square = x * x
        small = x + x * square * polynomial(square, _TANH, lanes)
        magnitude = tirx.max(x, const(0) - x)
        large = const(1) - const(2) / (exp(magnitude + magnitude, lanes) + const(1))
        signed = tirx.Select(x < const(0), const(0) - large, large)
        return tirx.Select(magnitude < const(0.8), small, signed)

    return bind(x, lanes, both)


def erf(x: Any, lanes: int) -> Any:
    """An odd polynomial below 1, 1 - e**P(|x|) above with P fitted to log(erfc)."""

    def const(value: float) -> Any:
        return splat(float32(value), lanes)

    def both(x: Any) -> Any:
        small = x * polynomial(x * x, _ERF, lanes)
        magnitude = tirx.max(x, const(0) - x)
        bounded = tirx.min(magnitude, const(4))
        large = const(1) - exp(polynomial(bounded, _LOG_ERFC, lanes), lanes)
        signed = tirx.Select(x < const(0), const(0) - large, large)
        return tirx.Select(magnitude < const(1), small, signed)

    return bind(x, lanes, both)
