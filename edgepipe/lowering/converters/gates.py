"""Activation functions of RNN, GRU and LSTM, by name and with their defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from edgepipe.lowering.converters.numeric import libm, like, zero
from edgepipe.lowering.converters.op import Op

Activation = Callable[[Any], Any]

_DEFAULTS = {
    "RNN": ("Tanh",),
    "GRU": ("Sigmoid", "Tanh"),
    "LSTM": ("Sigmoid", "Tanh", "Tanh"),
}
#: Name → (function of x, alpha, beta; default alpha; default beta).
_ACTIVATIONS: dict[str, tuple[Callable[[Any, float, float], Any], float, float]] = {
    "affine": (lambda x, a, b: like(a, x) * x + like(b, x), 1.0, 0.0),
    "elu": (
        lambda x, a, b: tirx.Select(x < zero(x), like(a, x) * (tirx.exp(x) - like(1, x)), x),
        1.0,
        0.0,
    ),
    "hardsigmoid": (
        lambda x, a, b: tirx.max(zero(x), tirx.min(like(1, x), like(a, x) * x + like(b, x))),
        0.2,
        0.5,
    ),
    "leakyrelu": (lambda x, a, b: tirx.Select(x < zero(x), like(a, x) * x, x), 0.01, 0.0),
    "relu": (lambda x, a, b: tirx.max(x, zero(x)), 0.0, 0.0),
    "scaledtanh": (lambda x, a, b: like(a, x) * tirx.tanh(like(b, x) * x), 1.0, 1.0),
    "sigmoid": (lambda x, a, b: tirx.sigmoid(x), 0.0, 0.0),
    "softplus": (
        lambda x, a, b: tirx.max(x, zero(x)) + libm("log1p", tirx.exp(zero(x) - tirx.abs(x))),
        0.0,
        0.0,
    ),
    "softsign": (lambda x, a, b: x / (like(1, x) + tirx.abs(x)), 0.0, 0.0),
    "tanh": (lambda x, a, b: tirx.tanh(x), 0.0, 0.0),
    "thresholdedrelu": (lambda x, a, b: tirx.Select(x > like(a, x), x, zero(x)), 1.0, 0.0),
}


def activations(op: Op, directions: int) -> list[tuple[Activation, ...]]:
    """Activation functions per direction; alphas and betas are consumed in order."""
    each = len(_DEFAULTS[op.type])
    names = list(op.attr("activations", _DEFAULTS[op.type] * directions))
    alphas, betas = list(op.attr("activation_alpha", ())), list(op.attr("activation_beta", ()))
    takes_alpha = {"affine", "elu", "hardsigmoid", "leakyrelu", "scaledtanh", "thresholdedrelu"}
    takes_beta = {"affine", "hardsigmoid", "scaledtanh"}
    functions: list[Activation] = []
    for name in names:
        key = name.lower()
        if key not in _ACTIVATIONS:
            raise op.unsupported(f"activation {name}")
        f, alpha, beta = _ACTIVATIONS[key]
        if key in takes_alpha and alphas:
            alpha = alphas.pop(0)
        if key in takes_beta and betas:
            beta = betas.pop(0)
        functions.append(lambda x, f=f, alpha=alpha, beta=beta: f(x, alpha, beta))  # type: ignore[misc]
    return [tuple(functions[d * each : (d + 1) * each]) for d in range(directions)]
