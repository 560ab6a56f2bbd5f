"""Makers of products, reductions, attention and recurrence."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.random_graphs.builder import Builder, RejectedError, Value
from tests.random_graphs.makers import maker
from tests.random_graphs.movement import axes_of, axis_of

REDUCTIONS = (
    "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceSumSquare", "ReduceLogSumExp",
)  # fmt: skip


@maker(sequence=8, any=2)
def dense(g: Builder) -> None:
    x = g.pick("f", least=1)
    inner, out = x.shape[-1], g.rng.choice([1, 2, 3, 5, 8, 16, 17])
    weight = g.normal(inner, out, dtype=x.dtype, fan_in=inner)
    (y,) = g.add("MatMul", [x, weight])
    if g.rng.random() < 0.6:
        (y,) = g.add("Add", g.rng.sample([y, g.normal(out, dtype=x.dtype)], 2))
    if g.rng.random() < 0.4:
        g.add("Relu", [y])


@maker(sequence=2, image=2, any=1)
def gemm(g: Builder) -> None:
    x = g.pick("f", least=2)
    if x.array.ndim > 2:
        (x,) = g.add("Flatten", [x], axis=g.rng.choice([1, 1, 2]))
    turned, swapped = g.rng.random() < 0.2, g.rng.random() < 0.5
    inner, rows = (x.shape[0], x.shape[1]) if turned else (x.shape[1], x.shape[0])
    out = g.rng.choice([1, 3, 8, 10])
    shape = (out, inner) if swapped else (inner, out)
    operands = [x, g.normal(*shape, dtype=x.dtype, fan_in=inner)]
    if g.rng.random() < 0.7 or g.opset < 11:
        wanted = g.rng.choice([(out,), (1, out), (rows, 1), (rows, out), (1,)])
        operands.append(g.normal(*wanted, dtype=x.dtype))
    scale = {"alpha": 0.5, "beta": 1.5} if g.rng.random() < 0.2 else {}
    g.add("Gemm", operands, transA=int(turned), transB=int(swapped), **scale)


@maker(sequence=2, any=1)
def product(g: Builder) -> None:
    x = g.pick("f", least=1, most=4)
    others = [v for v in g.values if v.dtype == x.dtype and v.array.ndim > 1 and
              v.shape[-2] == x.shape[-1]]  # fmt: skip
    if others and g.rng.random() < 0.6:
        g.add("MatMul", [x, g.rng.choice(others)])
    elif x.array.ndim > 1:
        order = [*range(x.array.ndim - 2), x.array.ndim - 1, x.array.ndim - 2]
        (y,) = g.add("Transpose", [x], perm=order)
        g.add("MatMul", g.rng.sample([x, y], 2))


@maker(any=1)
def einsum(g: Builder) -> None:
    x = g.pick("f", least=2, most=3)
    if g.opset < 12:
        raise RejectedError("not yet there")
    if x.array.ndim == 2:
        weight = g.normal(x.shape[1], 5, dtype=x.dtype, fan_in=x.shape[1])
        equation = g.rng.choice(["ij,jk->ik", "ij,jk->ki", "ij,jk->k"])
        g.add("Einsum", [x, weight], equation=equation)
    else:
        weight = g.normal(x.shape[0], x.shape[2], 4, dtype=x.dtype, fan_in=x.shape[2])
        g.add("Einsum", [x, weight], equation=g.rng.choice(["bij,bjk->bik", "bij,bjk->ikb"]))


@maker(any=3, image=1, sequence=1, integer=1)
def reduction(g: Builder) -> None:
    x = g.pick("f" if g.rng.random() < 0.7 else "fi", least=1)
    op = g.rng.choice(REDUCTIONS)
    axes = None if g.rng.random() < 0.15 else axes_of(g, x.array.ndim)
    reduce(g, op, x, axes)


def reduce(g: Builder, op: str, x: Value, axes: list[int] | None) -> Value:
    """A reduction, its axes where the opset has them."""
    keep = g.rng.choice([0, 1, None])
    if axes is None:
        return g.add(op, [x], keepdims=keep)[0]
    if g.opset >= (13 if op == "ReduceSum" else 18):
        return g.add(op, [x, g.integers(axes)], keepdims=keep)[0]
    return g.add(op, [x], axes=axes, keepdims=keep)[0]


@maker(image=1)
def spatial_mean(g: Builder) -> None:
    x = g.pick("f", least=4, most=4)
    reduce(g, "ReduceMean", x, g.rng.choice([[2, 3], [3], [2], [1], [3, 2]]))


@maker(any=1, integer=1)
def extremum(g: Builder) -> None:
    x = g.pick("f" if g.opset < 12 else "fi", least=1)
    last = {"select_last_index": g.rng.choice([0, 1])} if g.opset >= 12 else {}
    axis = axis_of(g, x.array.ndim) if g.opset >= 11 else g.rng.randrange(x.array.ndim)
    g.add(g.rng.choice(["ArgMax", "ArgMin"]), [x], axis=axis, keepdims=g.rng.choice([0, 1]), **last)


@maker(any=1)
def cumulative(g: Builder) -> None:
    x = g.pick("f", least=1)
    if g.opset < 11:
        raise RejectedError("not yet there")
    g.add("CumSum", [x, g.integers(axis_of(g, x.array.ndim))],
          exclusive=g.rng.choice([0, 1]), reverse=g.rng.choice([0, 1]))  # fmt: skip


@maker(any=1)
def top(g: Builder) -> None:
    x = g.pick("f", least=1)
    axis = axis_of(g, x.array.ndim) if g.opset >= 11 else g.rng.randrange(x.array.ndim)
    count = g.rng.randint(1, x.shape[axis])
    if g.opset < 10:
        g.add("TopK", [x], outputs=2, axis=axis, k=count)
        return
    largest = {"largest": g.rng.choice([0, 1])} if g.opset >= 11 else {}
    g.add("TopK", [x, g.integers([count])], outputs=2, axis=axis, **largest)


@maker(sequence=2, image=1, any=2)
def softmax(g: Builder) -> None:
    x = g.pick("f", least=1)
    axis = axis_of(g, x.array.ndim) if g.opset >= 11 else g.rng.randrange(x.array.ndim)
    op = g.rng.choice(["Softmax", "Softmax", "LogSoftmax", "Hardmax"])
    g.add(op, [x], axis=None if g.rng.random() < 0.2 else axis)


@maker(sequence=3, any=1)
def layer_norm(g: Builder) -> None:
    x = g.pick("f", least=1)
    axis = g.rng.choice([-1, -1, axis_of(g, x.array.ndim)])
    shape = x.shape[axis:]
    scale, shift = (g.constant(g.contents(shape, x.dtype)) for _ in range(2))
    if g.opset >= 23 and g.rng.random() < 0.4:
        g.add("RMSNormalization", [x, scale], axis=axis)
    elif g.opset >= 17:
        rest = [shift] if g.rng.random() < 0.7 else []
        g.add("LayerNormalization", [x, scale, *rest], axis=axis)
    else:
        decomposed_layer_norm(g, x, scale, shift)


def decomposed_layer_norm(g: Builder, x: Value, scale: Value, shift: Value) -> None:
    """As exporters wrote it before there was an operator."""
    (mean,) = g.add("ReduceMean", [x], axes=[x.array.ndim - 1], keepdims=1)
    (centred,) = g.add("Sub", [x, mean])
    (square,) = g.add("Pow", [centred, g.constant(np.asarray(2, x.dtype))])
    (variance,) = g.add("ReduceMean", [square], axes=[x.array.ndim - 1], keepdims=1)
    (padded,) = g.add("Add", [variance, g.constant(np.asarray(1e-2, x.dtype))])
    (root,) = g.add("Sqrt", [padded])
    (y,) = g.add("Div", [centred, root])
    (y,) = g.add("Mul", [y, scale])
    g.add("Add", [y, shift])


@maker(sequence=2)
def attention(g: Builder) -> None:
    """Single-head self-attention in primitive operators."""
    x = g.pick("f", least=2, most=3)
    width = x.shape[-1]
    q, k, v = (g.add("MatMul", [x, g.normal(width, 4, dtype=x.dtype, fan_in=width)])[0]
               for _ in range(3))  # fmt: skip
    order = [*range(x.array.ndim - 2), x.array.ndim - 1, x.array.ndim - 2]
    (scores,) = g.add("MatMul", [q, g.add("Transpose", [k], perm=order)[0]])
    (scores,) = g.add("Mul", [scores, g.constant(np.asarray(0.5, x.dtype))])
    (shares,) = g.add("Softmax", [scores], axis=x.array.ndim - 1)
    g.add("MatMul", [shares, v])


@maker(sequence=2)
def attention_operator(g: Builder) -> None:
    x = g.pick("f", least=3, most=4)
    if g.opset < 23:
        raise RejectedError("not yet there")
    if x.array.ndim == 3:
        heads = g.rng.choice([h for h in (1, 2, 3, 4) if x.shape[-1] % h == 0])
        settings: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": heads}
    else:
        settings = {}
    g.add("Attention", [x, x, x], is_causal=g.rng.choice([0, 1]), **settings)


@maker(sequence=2)
def recurrence(g: Builder) -> None:
    x = g.pick("f", least=3, most=3, size=200)
    op, gates = g.rng.choice([("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    hidden, direction = (
        g.rng.choice([1, 3, 4]),
        g.rng.choice(["forward", "reverse", "bidirectional"]),
    )
    count = 2 if direction == "bidirectional" else 1
    width = x.shape[2]
    weights = [
        g.normal(count, gates * hidden, size, dtype=x.dtype, fan_in=2 * size)
        for size in (width, hidden)
    ]
    shift = [g.normal(count, 2 * gates * hidden, dtype=x.dtype, fan_in=8)]
    extra: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        extra["linear_before_reset"] = g.rng.choice([0, 1])
    inputs: list[Value | None] = [x, *weights, *(shift if g.rng.random() < 0.7 else [])]
    if g.rng.random() < 0.3:
        inputs += [None] * (4 - len(inputs))
        lengths = g.numbers.integers(1, x.shape[0] + 1, x.shape[1]).astype(np.int32)
        inputs.append(g.constant(lengths))
    g.add(op, inputs, outputs=3 if op == "LSTM" else 2, **extra)
