"""Operators of a canonical graph as torch functions over batches.

The graph is for one sample, with a leading dimension of 1; here that dimension holds any number.
So an operator that moves it, mixes along it, or lacks it, is refused, as one that is not known.
Linear operators with trained weights get weight and bias as further arguments.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from edgepipe.errors import Unsupported
from edgepipe.quantization.finetune.operators_spatial import (
    SPATIAL,
    Function,
    Refused,
    known_dims,
    required,
)
from edgepipe.quantization.graph import bounds, constant, dims

#: Operators whose operands broadcast: computed operands need one rank to keep samples apart.
BROADCAST = frozenset(("Add", "Sub", "Mul", "Div", "MatMul", "Max", "Min", "Pow"))


def function_of(node: ir.Node) -> Function:
    """The torch function of ``node``: its inputs in order (None where left out) → its outputs.

    Raises Unsupported, naming operator and node.
    """
    try:
        build = _BUILDERS.get(node.op_type) if node.domain == "" else None
        if build is None:
            raise Refused("fine-tuning does not know this operator")
        _check_batch(node)
        return build(node)
    except Refused as reason:
        raise Unsupported(
            f"{node.op_type} cannot be fine-tuned: {reason}",
            where=f"node '{node.name}'",
            fix="quantize without fine-tuning",
        ) from None


def _check_batch(node: ir.Node) -> None:
    computed = [v for v in node.inputs if v is not None and v.const_value is None]
    shapes = []
    for value in [*computed, *node.outputs]:
        shape = dims(value)
        if shape is None:
            raise Refused(f"the shape of '{value.name}' depends on the data")
        if not shape or shape[0] != 1:
            raise Refused(f"'{value.name}' {list(shape)} has no leading dimension of 1 for samples")
        shapes.append(shape)
    if node.op_type in BROADCAST and len({len(shape) for shape in shapes}) > 1:
        raise Refused("its operands have different ranks")


def _axis(node: ir.Node, default: int) -> int:
    """The ``axis`` attribute, not negative; refuses the axis of samples."""
    axis = node.attributes.get_int("axis", default)
    axis += len(known_dims(node.inputs[0])) if axis < 0 else 0
    if axis == 0:
        raise Refused("it works along the axis of samples")
    return axis


def _pure(function: Callable[..., torch.Tensor]) -> Callable[[ir.Node], Function]:
    return lambda node: function


def _float(name: str, default: float, function: Callable[..., torch.Tensor]) -> Any:
    """A function of one tensor and one float attribute."""

    def build(node: ir.Node) -> Function:
        number = node.attributes.get_float(name, default)
        return lambda x: function(x, number)

    return build


def _gemm(node: ir.Node) -> Function:
    flip = not node.attributes.get_int("transB", 0)
    return lambda x, w, b=None: functional.linear(x, w.T if flip else w, b)


def _matmul(node: ir.Node) -> Function:
    def multiply(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        product = a @ b
        return product if bias is None else product + bias

    if constant(node.inputs[0]) is None and constant(node.inputs[1]) is None:
        if len(known_dims(node.inputs[0])) < 3:
            raise Refused("a product of two computed matrices needs 3 dimensions or more")
    elif constant(node.inputs[0]) is not None and len(known_dims(node.inputs[1])) < 3:
        raise Refused("it sums along the axis of samples")
    return multiply


def _clip(node: ir.Node) -> Function:
    limits = bounds(node)
    if limits is None:
        raise Refused("its bounds are computed")
    low, high = limits
    return lambda x, *_: x.clamp(low, high)


def _reshape(node: ir.Node) -> Function:
    target = known_dims(node.outputs[0])[1:]
    return lambda x, *_: x.reshape(x.shape[0], *target)


def _transpose(node: ir.Node) -> Function:
    rank = len(known_dims(node.inputs[0]))
    order = [int(a) for a in node.attributes.get_ints("perm", tuple(reversed(range(rank))))]
    if order[0] != 0:
        raise Refused("it moves the axis of samples")
    return lambda x: x.permute(order)


def _slice(node: ir.Node) -> Function:
    shape = known_dims(node.inputs[0])
    starts, ends = required(node, 1).tolist(), required(node, 2).tolist()
    axes = required(node, 3).tolist() if len(node.inputs) > 3 else list(range(len(starts)))
    steps = required(node, 4).tolist() if len(node.inputs) > 4 else [1] * len(starts)
    picked = []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = axis % len(shape)  # noqa: PLW2901
        # ONNX says "to the very first element" with an end far below zero.
        last = None if step < 0 and end < -shape[axis] else end
        index = np.arange(shape[axis])[slice(start, last, step)]
        if axis == 0 and len(index) != 1:
            raise Refused("it cuts along the axis of samples")
        if axis != 0:
            picked.append((axis, index))

    def cut(x: torch.Tensor, *_: object) -> torch.Tensor:
        for axis, index in picked:
            x = _take(x, axis, index)
        return x

    return cut


def _take(x: torch.Tensor, axis: int, index: np.ndarray) -> torch.Tensor:
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if len(index) and step > 0:
        return x[(slice(None),) * axis + (slice(int(index[0]), int(index[-1]) + 1, step),)]
    return x.index_select(axis, torch.from_numpy(index.copy()))


def _gather(node: ir.Node) -> Function:
    index, axis = required(node, 1), _axis(node, 0)
    size = known_dims(node.inputs[0])[axis]
    flat = torch.tensor(np.where(index < 0, index + size, index).reshape(-1).astype(np.int64))
    target = known_dims(node.outputs[0])[1:]
    return lambda x, *_: x.index_select(axis, flat).reshape(x.shape[0], *target)


def _concat(node: ir.Node) -> Function:
    axis = _axis(node, 1)

    def join(*parts: torch.Tensor) -> torch.Tensor:
        count = max(part.shape[0] for part in parts)
        return torch.cat([p.expand(count, *p.shape[1:]) for p in parts], axis)

    return join


def _split(node: ir.Node) -> Function:
    axis = _axis(node, 1)
    sizes = [known_dims(value)[axis] for value in node.outputs]
    return lambda x, *_: list(x.split(sizes, axis))


def _softmax(node: ir.Node) -> Function:
    axis = _axis(node, -1)
    function = torch.log_softmax if node.op_type == "LogSoftmax" else torch.softmax
    return lambda x: function(x, axis)


def _layer_norm(node: ir.Node) -> Function:
    shape = known_dims(node.inputs[0])[_axis(node, -1) :]
    epsilon = node.attributes.get_float("epsilon", 1e-5)

    def normalise(
        x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = functional.layer_norm(x, shape, None, None, epsilon) * scale
        return found if bias is None else found + bias

    if len(node.outputs) > 1:
        raise Refused("its mean and deviation are read")
    return normalise


def _reduce_mean(node: ir.Node) -> Function:
    rank = len(known_dims(node.inputs[0]))
    axes = required(node, 1).tolist() if len(node.inputs) > 1 else list(range(rank))
    axes = [axis % rank for axis in axes]
    if 0 in axes:
        raise Refused("it averages along the axis of samples")
    keep = bool(node.attributes.get_int("keepdims", 1))
    return lambda x, *_: x.mean(axes, keepdim=keep)


def _gelu(node: ir.Node) -> Function:
    mode = node.attributes.get_string("approximate", "none")
    return lambda x: functional.gelu(x, approximate=mode)


def _hard_sigmoid(node: ir.Node) -> Function:
    alpha = node.attributes.get_float("alpha", 0.2)
    beta = node.attributes.get_float("beta", 0.5)
    return lambda x: (alpha * x + beta).clamp(0.0, 1.0)


def _selu(node: ir.Node) -> Function:
    alpha = node.attributes.get_float("alpha", 1.67326319217681884765625)
    gamma = node.attributes.get_float("gamma", 1.05070102214813232421875)
    return lambda x: gamma * functional.elu(x, alpha)


def _softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


_BUILDERS: dict[str, Callable[[ir.Node], Function]] = {
    **SPATIAL,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _pure(torch.add),
    "Sub": _pure(torch.sub),
    "Mul": _pure(torch.mul),
    "Div": _pure(torch.div),
    "Pow": _pure(torch.pow),
    "Max": _pure(torch.maximum),
    "Min": _pure(torch.minimum),
    "Identity": _pure(lambda x: x),
    "Relu": _pure(torch.relu),
    "Clip": _clip,
    "Sigmoid": _pure(torch.sigmoid),
    "Tanh": _pure(torch.tanh),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _pure(lambda x: x * (x / 6 + 0.5).clamp(0.0, 1.0)),
    "LeakyRelu": _float("alpha", 0.01, functional.leaky_relu),
    "Elu": _float("alpha", 1.0, functional.elu),
    "Selu": _selu,
    "Softplus": _pure(_softplus),
    "Softsign": _pure(functional.softsign),
    "Mish": _pure(lambda x: x * _softplus(x).tanh()),
    "Gelu": _gelu,
    "Erf": _pure(torch.erf),
    "Abs": _pure(torch.abs),
    "Neg": _pure(torch.neg),
    "Exp": _pure(torch.exp),
    "Log": _pure(torch.log),
    "Sqrt": _pure(torch.sqrt),
    "Reciprocal": _pure(torch.reciprocal),
    "PRelu": _pure(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Slice": _slice,
    "Gather": _gather,
    "Concat": _concat,
    "Split": _split,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "LayerNormalization": _layer_norm,
    "ReduceMean": _reduce_mean,
}
