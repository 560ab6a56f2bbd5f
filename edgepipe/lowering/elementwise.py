"""ONNX elementwise nodes as epilogue steps."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepipe.kernels.epilogue import Step

_PLAIN = {
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "HardSwish": "hard_swish",
    "Sqrt": "sqrt",
    "Neg": "neg",
    "Abs": "abs",
}
#: op type → (kind when the fused value is the first operand, kind when it is the second)
_BINARY = {
    "Add": ("add", "add"),
    "Mul": ("mul", "mul"),
    "Sub": ("sub", "rsub"),
    "Max": ("max", "max"),
    "Min": ("min", "min"),
    "PRelu": ("prelu", None),
}


def attribute(node: ir.Node, name: str, default: float | int | str) -> float | int | str:
    """A scalar attribute or its default."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, or None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def _scalar(value: ir.Value | None) -> float | None:
    array = constant(value)
    if array is None or array.size != 1 or array.dtype != np.float32:
        return None
    return float(array.reshape(()))


def unary_step(node: ir.Node) -> Step | None:
    """The step for a node with one data input, or None."""
    kind = node.op_type
    if kind in _PLAIN:
        return Step(_PLAIN[kind])
    if kind == "LeakyRelu":
        return Step("leaky_relu", (float(attribute(node, "alpha", 0.01)),))
    if kind == "Elu":
        return Step("elu", (float(attribute(node, "alpha", 1.0)),))
    if kind == "HardSigmoid":
        alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        return Step("hard_sigmoid", (float(alpha), float(beta)))
    if kind == "Gelu":
        return Step("gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu")
    if kind == "Clip":
        return _clip_step(node)
    return None


def _clip_step(node: ir.Node) -> Step | None:
    bounds = [-math.inf, math.inf]
    for i, value in enumerate(node.inputs[1:3]):
        if value is not None:
            bound = _scalar(value)
            if bound is None:
                return None
            bounds[i] = bound
    return Step("clip", (bounds[0], bounds[1]))


def binary_step(node: ir.Node, main: ir.Value) -> tuple[Step, ir.Value | None] | None:
    """The step that folds ``node`` onto ``main``, and its other operand unless it is a scalar."""
    if node.op_type not in _BINARY and node.op_type != "Div":
        return None
    if len(node.inputs) != 2:
        return None
    first = node.inputs[0] is main
    other = node.inputs[1] if first else node.inputs[0]
    if other is None or other is main:
        return None
    scalar = _scalar(other)
    if scalar is not None and len(other.shape or ()) <= len(main.shape or ()):
        step = _scalar_step(node.op_type, first, scalar)
        if step is not None:
            return step, None
    if node.op_type == "Div":
        return None
    kind = _BINARY[node.op_type][0 if first else 1]
    return None if kind is None else (Step(kind), other)


def _scalar_step(op_type: str, first: bool, scalar: float) -> Step | None:
    if op_type == "Add":
        return Step("offset", (scalar,))
    if op_type == "Mul":
        return Step("scale", (scalar,))
    if op_type == "Sub" and first:
        return Step("offset", (-scalar,))
    # A power of two has an exact reciprocal; any other divisor is left to a real division.
    if op_type == "Div" and first and scalar and math.frexp(scalar)[0] in (0.5, -0.5):
        return Step("scale", (1 / scalar,))
    return None
