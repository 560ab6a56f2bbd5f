"""Makers of operators that work element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from tests.random_graphs.builder import Builder, RejectedError
from tests.random_graphs.makers import maker

#: Operator → the first opset that has it (1 where older than all here).
UNARY = {
    "Abs": 1, "Acos": 7, "Acosh": 9, "Asin": 7, "Asinh": 9, "Atan": 7, "Atanh": 9, "Ceil": 1,
    "Cos": 7, "Cosh": 9, "Erf": 9, "Exp": 1, "Floor": 1, "HardSwish": 14, "Identity": 1, "Log": 1,
    "Mish": 18, "Neg": 1, "Reciprocal": 1, "Relu": 1, "Round": 11, "Sigmoid": 1, "Sign": 9,
    "Sin": 7, "Sinh": 9, "Softplus": 1, "Softsign": 1, "Sqrt": 1, "Tan": 7, "Tanh": 1,
}  # fmt: skip
ACTIVATIONS = {
    "Relu": (), "Sigmoid": (), "Tanh": (), "HardSwish": (), "Mish": (), "Softplus": (),
    "LeakyRelu": ("alpha",), "Elu": ("alpha",), "Celu": ("alpha",), "ThresholdedRelu": ("alpha",),
    "Selu": (), "HardSigmoid": ("alpha", "beta"), "Gelu": (), "Shrink": ("lambd", "bias"),
}  # fmt: skip
_SINCE = {"HardSwish": 14, "Mish": 18, "Celu": 12, "ThresholdedRelu": 10, "Gelu": 20, "Shrink": 9}
_DTYPES = {
    TensorProto.FLOAT: 4, TensorProto.INT32: 2, TensorProto.INT64: 2, TensorProto.BOOL: 1,
    TensorProto.UINT8: 1, TensorProto.INT8: 1, TensorProto.FLOAT16: 1,
}  # fmt: skip


@maker(any=4, sequence=1)
def unary(g: Builder) -> None:
    op = g.rng.choice([op for op, since in UNARY.items() if since <= g.opset])
    x = g.pick("f")
    if op in ("Log", "Sqrt", "Reciprocal", "Acosh"):
        x = g.add("Add", [g.add("Abs", [x])[0], g.constant(np.asarray(1.25, x.dtype))])[0]
    elif op in ("Acos", "Asin", "Atanh"):
        x = g.add("Mul", [g.add("Tanh", [x])[0], g.constant(np.asarray(0.75, x.dtype))])[0]
    elif op in ("Exp", "Sinh", "Cosh", "Tan"):
        x = g.add("Tanh", [x])[0]
    g.add(op, [x])


@maker(image=4, sequence=3, any=2)
def activation(g: Builder) -> None:
    op = g.rng.choice([op for op in ACTIVATIONS if _SINCE.get(op, 1) <= g.opset])
    attributes: dict[str, Any] = {
        name: g.rng.choice([0.1, 0.25, 0.5, 1.0, 1.5])
        for name in ACTIVATIONS[op]
        if g.rng.random() < 0.7
    }
    if op == "Gelu" and g.rng.random() < 0.5:
        attributes["approximate"] = "tanh"
    x = g.pick("f")
    (y,) = g.add(op, [x], **attributes)
    if op == "Sigmoid" and g.rng.random() < 0.5:
        g.add("Mul", [x, y])


@maker(image=2, any=1, sequence=1)
def clip(g: Builder) -> None:
    x = g.pick("f" if g.opset < 12 else "fi")
    low, high = g.rng.choice([(0, 6), (-1, 1), (0, None), (None, 2), (-2, 5)])
    if g.opset < 11:
        g.add("Clip", [x], min=None if low is None else float(low),
              max=None if high is None else float(high))  # fmt: skip
        return
    bounds = [None if v is None else g.constant(np.asarray(v, x.dtype)) for v in (low, high)]
    while bounds and bounds[-1] is None:
        bounds.pop()
    g.add("Clip", [x, *bounds])


@maker(image=4, sequence=3, any=5, integer=6)
def binary(g: Builder) -> None:
    x = g.pick("fiu" if g.rng.random() < 0.3 else ("f" if _has_floats(g) else "iu"))
    y = g.operand(x)
    op = g.rng.choice(["Add", "Add", "Mul", "Mul", "Sub", "Div", "Max", "Min"])
    if op == "Div":
        y = g.constant(_away_from_zero(g, y.shape, x.dtype))
    elif g.rng.random() < 0.4:
        x, y = y, x
    g.add(op, [x, y])


def _has_floats(g: Builder) -> bool:
    return any(v.is_float for v in g.values)


def _away_from_zero(g: Builder, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    array = g.contents(shape, dtype)
    one = np.asarray(1, dtype)
    return np.where(np.abs(array) < one, one, array).astype(dtype)


@maker(image=3, sequence=2)
def residual(g: Builder) -> None:
    x = g.pick("f", least=2)
    same = [v for v in g.values if v.shape == x.shape and v.dtype == x.dtype and v is not x]
    if not same:
        raise RejectedError("nothing of that shape")
    (y,) = g.add("Add", g.rng.sample([x, g.rng.choice(same)], 2))
    if g.rng.random() < 0.4:
        g.add("Relu", [y])


@maker(any=1)
def variadic(g: Builder) -> None:
    x = g.pick("f")
    operands = [x] + [g.operand(x) for _ in range(g.rng.randint(0, 3))]
    g.add(g.rng.choice(["Sum", "Mean", "Max", "Min"]), operands)


@maker(any=1)
def power(g: Builder) -> None:
    x = g.pick("f")
    exponent = g.rng.choice([2, 3, 0.5, -1, 1, 0, 2.5])
    if exponent not in (2, 3, 1, 0):
        x = g.add("Add", [g.add("Abs", [x])[0], g.constant(np.asarray(0.5, x.dtype))])[0]
    g.add("Pow", [x, g.constant(np.asarray(exponent, x.dtype))])


@maker(any=1, integer=2)
def modulo(g: Builder) -> None:
    x = g.pick("iuf") if g.opset >= 10 else g.pick("f")
    y = g.constant(_away_from_zero(g, g.operand(x).shape, x.dtype))
    g.add("Mod", [x, y], fmod=1 if x.is_float else g.rng.choice([0, 1, None]))


@maker(any=2, integer=3)
def comparison(g: Builder) -> None:
    ops = ["Equal", "Greater", "Less"]
    if g.opset >= 12:
        ops += ["GreaterOrEqual", "LessOrEqual"]
    x = g.pick("fiu")
    (mask,) = g.add(g.rng.choice(ops), [x, g.operand(x)])
    if g.rng.random() < 0.5 and g.opset >= 9:
        y = g.pick("fiu")
        g.add("Where", [mask, y, g.operand(y)])


@maker(any=1, integer=3)
def logical(g: Builder) -> None:
    x = g.pick("b")
    if g.rng.random() < 0.3:
        g.add("Not", [x])
    else:
        g.add(g.rng.choice(["And", "Or", "Xor"]), [x, g.operand(x)])


@maker(integer=3)
def bits(g: Builder) -> None:
    if g.opset >= 18 and g.rng.random() < 0.6:
        x = g.pick("iu")
        if g.rng.random() < 0.25:
            g.add("BitwiseNot", [x])
        else:
            g.add(g.rng.choice(["BitwiseAnd", "BitwiseOr", "BitwiseXor"]), [x, g.operand(x)])
    elif g.opset >= 11:
        x = g.pick("u")
        g.add("BitShift", [x, g.operand(x)], direction=g.rng.choice(["LEFT", "RIGHT"]))


@maker(any=2, integer=3)
def cast(g: Builder) -> None:
    to = g.rng.choices(list(_DTYPES), list(_DTYPES.values()))[0]
    x = g.pick("fiub")
    if x.is_float and to in (TensorProto.UINT8, TensorProto.INT8):
        x = g.add("Abs", [x])[0]  # what lies outside the range is undefined
    g.add("Cast", [x], to=to)


@maker(any=1)
def tests_of_floats(g: Builder) -> None:
    x = g.pick("f")
    if g.opset >= 10 and g.rng.random() < 0.5:
        g.add("IsInf", [x], detect_negative=g.rng.choice([0, 1]))
    elif g.opset >= 9:
        g.add("IsNaN", [x])


@maker(image=1, any=1)
def prelu(g: Builder) -> None:
    x = g.pick("f", least=2)
    slope = (x.shape[1], *(1,) * (x.array.ndim - 2)) if g.rng.random() < 0.7 else (1,)
    g.add("PRelu", [x, g.constant(g.contents(slope, x.dtype))])


@maker(any=1)
def dropout(g: Builder) -> None:
    x = g.pick("f")
    if g.opset >= 12:
        g.add("Dropout", [x, g.constant(np.float32(0.3))], outputs=g.rng.choice([1, 1, 2]))
    else:
        g.add("Dropout", [x], ratio=0.3)
