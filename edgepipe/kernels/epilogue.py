"""Elementwise steps fused behind a kernel: activations, residual adds, gates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx

from edgepipe.kernels import math
from edgepipe.kernels.builder import float32, splat


@dataclass(frozen=True)
class Step:
    """One elementwise step. ``values`` are its float constants (clip bounds, slope, ...).

    The kinds of BINARY take the next residual operand.
    """

    kind: str
    values: tuple[float, ...] = ()

    @property
    def takes_operand(self) -> bool:
        return self.kind in BINARY

    def __str__(self) -> str:
        return self.kind + ("(" + ",".join(f"{v:g}" for v in self.values) + ")") * bool(self.values)


def _constants(lanes: int) -> Callable[[float], Any]:
    return lambda value: splat(float32(value), lanes)


def _prelu(x: Any, slope: Any) -> Any:
    zero = x - x
    return tirx.Select(x > zero, x, x * slope)


def _clip(x: Any, low: Any, high: Any) -> Any:
    return tirx.min(tirx.max(x, low), high)


def _hard_sigmoid(x: Any, lanes: int, alpha: float, beta: float) -> Any:
    const = _constants(lanes)
    return _clip(x * const(alpha) + const(beta), const(0), const(1))


def _gelu(x: Any, lanes: int) -> Any:
    const = _constants(lanes)
    return const(0.5) * x * (const(1) + math.erf(x * const(0.7071067811865476), lanes))


def _gelu_tanh(x: Any, lanes: int) -> Any:
    const = _constants(lanes)
    inner = const(0.7978845608028654) * (x + const(0.044715) * x * x * x)
    return const(0.5) * x * (const(1) + math.tanh(inner, lanes))


def _elu(x: Any, lanes: int, alpha: float) -> Any:
    zero = splat(float32(0), lanes)
    below = splat(float32(alpha), lanes) * (math.exp(x, lanes) - splat(float32(1), lanes))
    return tirx.Select(x > zero, x, below)


#: kind → f(x, lanes, *values)
UNARY: dict[str, Callable[..., Any]] = {
    "relu": lambda x, n: tirx.max(x, splat(float32(0), n)),
    "clip": lambda x, n, lo, hi: _clip(x, splat(float32(lo), n), splat(float32(hi), n)),
    "leaky_relu": lambda x, n, a: tirx.Select(
        x > splat(float32(0), n), x, x * splat(float32(a), n)
    ),
    "sigmoid": math.sigmoid,
    "tanh": math.tanh,
    "silu": lambda x, n: x * math.sigmoid(x, n),
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda x, n: x * _hard_sigmoid(x, n, 1 / 6, 0.5),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "elu": _elu,
    "scale": lambda x, n, a: x * splat(float32(a), n),
    "offset": lambda x, n, a: x + splat(float32(a), n),
    "sqrt": lambda x, n: tirx.sqrt(x),
    "neg": lambda x, n: splat(float32(0), n) - x,
    "abs": lambda x, n: tirx.max(x, splat(float32(0), n) - x),
}
#: kind → f(x, operand)
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, r: x + r,
    "mul": lambda x, r: x * r,
    "sub": lambda x, r: x - r,
    "rsub": lambda x, r: r - x,
    "max": tirx.max,
    "min": tirx.min,
    "prelu": _prelu,
}


def apply(steps: Sequence[Step], value: Any, lanes: int, operands: Sequence[Any]) -> Any:
    """Apply ``steps`` in order; ``operands`` are the residual vectors, in step order."""
    remaining = list(operands)
    for step in steps:
        if step.takes_operand:
            value = math.bind(value, lanes, partial(_binary, step.kind, remaining.pop(0)))
        else:
            value = math.bind(value, lanes, partial(_unary, step, lanes))
    return value


def _binary(kind: str, operand: Any, value: Any) -> Any:
    return BINARY[kind](value, operand)


def _unary(step: Step, lanes: int, value: Any) -> Any:
    return UNARY[step.kind](value, lanes, *step.values)


def describe(steps: Sequence[Step]) -> str:
    """``relu``, ``add+relu``: for kernel labels and the audit."""
    return "+".join(map(str, steps))
