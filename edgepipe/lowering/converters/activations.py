"""Activation functions with parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.lowering.converters.elementwise import hard_sigmoid, unary
from edgepipe.lowering.converters.numeric import is_float, like, zero
from edgepipe.lowering.converters.op import Expr, Op, cast
from edgepipe.lowering.converters.registry import converts


@converts("Elu")
def _elu(op: Op) -> Expr:
    alpha = op.attr("alpha", 1.0)
    return unary(
        op,
        lambda x: tirx.Select(x < zero(x), like(alpha, x) * (tirx.exp(x) - like(1, x)), x),
    )


@converts("Celu")
def _celu(op: Op) -> Expr:
    alpha = op.attr("alpha", 1.0)

    def f(x: Any) -> Any:
        negative = like(alpha, x) * (tirx.exp(x / like(alpha, x)) - like(1, x))
        return tirx.Select(x < zero(x), negative, x)

    return unary(op, f)


@converts("Selu")
def _selu(op: Op) -> Expr:
    alpha = op.attr("alpha", 1.67326319217681884765625)
    gamma = op.attr("gamma", 1.05070102214813232421875)

    def f(x: Any) -> Any:
        negative = like(alpha * gamma, x) * (tirx.exp(x) - like(1, x))
        return tirx.Select(x > zero(x), like(gamma, x) * x, negative)

    return unary(op, f)


@converts("LeakyRelu")
def _leaky_relu(op: Op) -> Expr:
    alpha = op.attr("alpha", 0.01)
    return unary(op, lambda x: tirx.Select(x < zero(x), like(alpha, x) * x, x))


@converts("ThresholdedRelu")
def _thresholded_relu(op: Op) -> Expr:
    alpha = op.attr("alpha", 1.0)
    return unary(op, lambda x: tirx.Select(x > like(alpha, x), x, zero(x)))


@converts("HardSigmoid")
def _hard_sigmoid_op(op: Op) -> Expr:
    alpha, beta = op.attr("alpha", 0.2), op.attr("beta", 0.5)
    return unary(op, lambda x: hard_sigmoid(x, alpha, beta))


@converts("Shrink")
def _shrink(op: Op) -> Expr:
    lambd, bias = op.attr("lambd", 0.5), op.attr("bias", 0.0)
    dtype = op.dtype()

    def f(x: Any) -> Any:
        y = x if is_float(dtype) else cast(x, "float32")
        inner = tirx.Select(y > like(lambd, y), y - like(bias, y), zero(y))
        return cast(tirx.Select(y < like(-lambd, y), y + like(bias, y), inner), dtype)

    return unary(op, f)


@converts("Gelu")
def _gelu(op: Op) -> Expr:
    def exact(x: Any) -> Any:
        half = like(0.5, x)
        return half * x * (like(1, x) + tirx.erf(x * like(float(np.sqrt(0.5)), x)))

    def approximate(x: Any) -> Any:
        inner = like(float(np.sqrt(2 / np.pi)), x) * (x + like(0.044715, x) * x * x * x)
        return like(0.5, x) * x * (like(1, x) + tirx.tanh(inner))

    return unary(op, approximate if op.attr("approximate", "none") == "tanh" else exact)


@converts("Swish")
def _swish(op: Op) -> Expr:
    alpha = op.attr("alpha", 1.0)
    return unary(op, lambda x: x * tirx.sigmoid(like(alpha, x) * x))
