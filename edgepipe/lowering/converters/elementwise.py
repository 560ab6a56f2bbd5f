"""Element-by-element operators: arithmetic, functions, comparison, logic, casts."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import tirx

from edgepipe.lowering.converters.numeric import (
    convert,
    divide,
    is_float,
    is_nan,
    libm,
    like,
    maximum,
    minimum,
    modulo,
    power,
    round_even,
    widened,
    zero,
)
from edgepipe.lowering.converters.op import Expr, Op, at, cast, const, kind
from edgepipe.lowering.converters.registry import converts


def _sign(x: Any) -> Any:
    if kind(x).startswith("uint"):
        return tirx.Select(x > zero(x), like(1, x), zero(x))
    signed = tirx.Select(x > zero(x), like(1, x), tirx.Select(x < zero(x), like(-1, x), zero(x)))
    return tirx.Select(is_nan(x), x, signed) if is_float(kind(x)) else signed


def _absolute(x: Any) -> Any:
    if kind(x).startswith("uint"):
        return x
    return tirx.abs(x) if is_float(kind(x)) else tirx.Select(x < zero(x), zero(x) - x, x)


def _softplus(x: Any) -> Any:
    """log(1 + e**x) without overflow."""
    return tirx.max(x, zero(x)) + libm("log1p", tirx.exp(zero(x) - tirx.abs(x)))


def hard_sigmoid(x: Any, alpha: float, beta: float) -> Any:
    """max(0, min(1, alpha·x + beta))."""
    return tirx.max(zero(x), tirx.min(like(1, x), like(alpha, x) * x + like(beta, x)))


def _relu(x: Any) -> Any:
    return maximum(x, zero(x))


_UNARY: dict[str, Callable[[Any], Any]] = {
    "Abs": _absolute,
    "Acos": lambda x: libm("acos", x),
    "Acosh": lambda x: libm("acosh", x),
    "Asin": lambda x: libm("asin", x),
    "Asinh": lambda x: libm("asinh", x),
    "Atan": lambda x: libm("atan", x),
    "Atanh": lambda x: libm("atanh", x),
    "BitwiseNot": tirx.bitwise_not,
    "Ceil": tirx.ceil,
    "Cos": lambda x: libm("cos", x),
    "Cosh": lambda x: libm("cosh", x),
    "Erf": tirx.erf,
    "Exp": tirx.exp,
    "Floor": tirx.floor,
    "HardSwish": lambda x: x * hard_sigmoid(x, 1 / 6, 0.5),
    "Log": lambda x: libm("log", x),
    "Mish": lambda x: x * tirx.tanh(_softplus(x)),
    "Neg": lambda x: zero(x) - x if not is_float(kind(x)) else like(-1, x) * x,
    "Not": tirx.Not,
    "Reciprocal": lambda x: like(1, x) / x,
    "Relu": _relu,
    "Round": round_even,
    "Sigmoid": tirx.sigmoid,
    "Sign": _sign,
    "Sin": lambda x: libm("sin", x),
    "Sinh": lambda x: libm("sinh", x),
    "Softplus": _softplus,
    "Softsign": lambda x: x / (like(1, x) + tirx.abs(x)),
    "Sqrt": tirx.sqrt,
    "Tan": lambda x: libm("tan", x),
    "Tanh": tirx.tanh,
}


def unary(op: Op, f: Callable[[Any], Any]) -> Expr:
    """Apply ``f`` to every element of the first input."""
    if op.dtype() == "bool" and op.type != "Not":
        raise op.unsupported("not defined on bool")
    return op.compute(op.out_shape(), lambda i, x: widened(f)(at(x, i)), op.inputs[0])


def _register_unary(name: str, f: Callable[[Any], Any]) -> None:
    converts(name)(lambda op: unary(op, f))


for _name, _function in _UNARY.items():
    _register_unary(_name, _function)


@converts("IsNaN")
def _is_nan(op: Op) -> Expr:
    return op.compute(op.out_shape(), lambda i, x: is_nan(at(x, i)), op.inputs[0])


@converts("IsInf")
def _is_inf(op: Op) -> Expr:
    positive, negative = op.attr("detect_positive", 1), op.attr("detect_negative", 1)

    def f(i: Any, x: Any) -> Any:
        v = at(x, i)
        v = cast(v, "float32") if op.dtype() == "float16" else v
        plus, minus = v == like(np.inf, v), v == like(-np.inf, v)
        if positive and negative:
            return tirx.Or(plus, minus)
        return plus if positive else minus if negative else const(False, "bool")

    return op.compute(op.out_shape(), f, op.inputs[0])


def _bit_shift(left: bool) -> Callable[[Any, Any], Any]:
    def f(x: Any, n: Any) -> Any:
        # A shift by the width or more is undefined in LLVM and zero in ONNX.
        bits = int(kind(x).removeprefix("uint"))
        width = const(bits, "int64")
        # Compared as int64: TVM's simplifier rejects some comparisons of unsigned values.
        amount = cast(n, "int64")
        inside = tirx.And(amount >= const(0, "int64"), amount < width)
        # LLVM 22 shifts vectors of bytes for WebAssembly in words, of which it forgets to cut what
        # a shift to the left leaves beyond the byte before the next one, to the right.
        word = cast(x, "uint32") if bits < 32 else x
        bounded = cast(tirx.Select(inside, amount, const(0, "int64")), kind(word))
        shifted = cast(word << bounded if left else word >> bounded, kind(x))
        return tirx.Select(inside, shifted, zero(x))

    return f


_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": divide,
    "BitwiseAnd": tirx.bitwise_and,
    "BitwiseOr": tirx.bitwise_or,
    "BitwiseXor": tirx.bitwise_xor,
    "PRelu": lambda x, slope: tirx.Select(x < zero(x), slope * x, x),
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "Equal": lambda a, b: a == b,
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
}
_LOGIC: dict[str, Callable[[Any, Any], Any]] = {
    "And": tirx.And,
    "Or": tirx.Or,
    "Xor": lambda a, b: tirx.Or(tirx.And(a, tirx.Not(b)), tirx.And(tirx.Not(a), b)),
}


def binary(op: Op, f: Callable[[Any, Any], Any]) -> Expr:
    """Apply ``f`` to every pair of the broadcast inputs."""
    return op.compute(op.out_shape(), lambda i, a, b: f(at(a, i), at(b, i)), *op.inputs[:2])


def _comparable(f: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def compare(a: Any, b: Any) -> Any:
        wide = {"float16": "float32", "bool": "int8"}.get(kind(a))
        return f(convert(a, wide), convert(b, wide)) if wide else f(a, b)

    return compare


def _register_binary(name: str, f: Callable[[Any, Any], Any]) -> None:
    converts(name)(lambda op: binary(op, f))


for _name, _pair in _BINARY.items():
    _register_binary(_name, widened(_pair))
for _name, _pair in _COMPARE.items():
    _register_binary(_name, _comparable(_pair))
for _name, _pair in _LOGIC.items():
    _register_binary(_name, _pair)


@converts("BitShift")
def _bit_shift_op(op: Op) -> Expr:
    return binary(op, _bit_shift(op.attr("direction") == "LEFT"))


@converts("Mod")
def _mod(op: Op) -> Expr:
    fmod = bool(op.attr("fmod", 0))
    return binary(op, widened(lambda a, b: modulo(a, b, fmod)))


@converts("Pow")
def _pow(op: Op) -> Expr:
    base, exponent = op.dtype(0), op.dtype(1)
    fixed = op.constant(1)
    small = None if fixed is None or fixed.size != 1 else float(fixed.reshape(()))

    def f(x: Any, y: Any) -> Any:
        if small in (1.0, 2.0, 3.0):
            return reduce(lambda a, b: a * b, [x] * int(small))
        if small == 0.5 and is_float(base):
            return tirx.sqrt(x)
        if is_float(base) == is_float(exponent) and is_float(base):
            return power(x, cast(y, kind(x)))
        if is_float(base):
            return power(x, convert(y, kind(x)))
        return convert(power(cast(x, "float64"), cast(y, "float64")), base)

    return binary(op, widened(f))


def _variadic(op: Op, f: Callable[..., Any]) -> Expr:
    return op.compute(
        op.out_shape(), lambda i, *xs: widened(f)(*[at(x, i) for x in xs]), *op.inputs
    )


@converts("Sum")
def _sum(op: Op) -> Expr:
    return _variadic(op, lambda *xs: reduce(lambda a, b: a + b, xs))


@converts("Mean")
def _mean(op: Op) -> Expr:
    return _variadic(op, lambda *xs: reduce(lambda a, b: a + b, xs) / like(len(xs), xs[0]))


@converts("Max")
def _max(op: Op) -> Expr:
    return _variadic(op, lambda *xs: reduce(maximum, xs))


@converts("Min")
def _min(op: Op) -> Expr:
    return _variadic(op, lambda *xs: reduce(minimum, xs))


@converts("Clip")
def _clip(op: Op) -> Expr:
    def f(i: Any, x: Any, low: Any, high: Any) -> Any:
        def clip(v: Any, *bounds: Any) -> Any:
            rest = list(bounds)
            if low is not None:
                v = maximum(v, rest.pop(0))
            return minimum(v, rest.pop(0)) if high is not None else v

        bounds = [
            at(b, ()) if not b.shape else b(*[0] * len(b.shape))
            for b in (low, high)
            if b is not None
        ]
        return widened(clip)(at(x, i), *bounds)

    low, high = (op.inputs[k] if op.has(k) else None for k in (1, 2))
    return op.compute(op.out_shape(), f, op.inputs[0], low, high)


@converts("Where")
def _where(op: Op) -> Expr:
    return op.compute(
        op.out_shape(),
        lambda i, c, a, b: tirx.Select(at(c, i), at(a, i), at(b, i)),
        *op.inputs[:3],
    )


@converts("Cast", "CastLike")
def _cast(op: Op) -> Expr:
    if op.type == "Cast" and ir.DataType(op.attr("to")).name.lower().startswith("float8"):
        raise op.unsupported("float8")
    dtype = op.out_dtype()
    if dtype == op.dtype():
        return op.inputs[0]
    return op.compute(op.out_shape(), lambda i, x: convert(at(x, i), dtype), op.inputs[0])


@converts("BitCast")
def _bit_cast(op: Op) -> Expr:
    own, dtype = op.dtype(), op.out_dtype()

    def element(i: Any, x: Any) -> Any:
        value = convert(at(x, i), "uint8") if own == "bool" else at(x, i)
        return convert(value, dtype) if dtype == "bool" else tirx.reinterpret(dtype, value)

    return op.compute(op.out_shape(), element, op.inputs[0])


@converts("Identity", "Dropout")
def _identity(op: Op) -> Any:
    if op.type == "Dropout":
        training = op.constant(2)
        if op.has(2) and (training is None or bool(training)):
            raise op.unsupported("training mode")
        if op.wants(1):
            return [op.inputs[0], op.const(np.ones(op.out_shape(1), np.bool_))]
    return op.inputs[0]
