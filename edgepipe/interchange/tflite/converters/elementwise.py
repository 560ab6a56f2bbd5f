"""Functions of one value, and sums and products of two tensors.

tflite fixes the output grid of LOGISTIC, TANH and SOFTMAX.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgepipe.interchange.tflite.layout import Place
from edgepipe.interchange.tflite.network import Grid
from edgepipe.interchange.tflite.reading import constant_of, is_constant, unsupported
from edgepipe.interchange.tflite.translation import Step, Translation
from edgepipe.quantization.graph import bounds, name_of

#: Function → operator, and the grid that tflite prescribes for its result.
FUNCTIONS: dict[str, tuple[str, Grid | None]] = {
    "Sigmoid": ("LOGISTIC", Grid(1 / 256, -128)),
    "Tanh": ("TANH", Grid(1 / 128, 0)),
    "HardSwish": ("HARD_SWISH", None),
    "LeakyRelu": ("LEAKY_RELU", None),
    "Elu": ("ELU", None),
    "Gelu": ("GELU", None),
    "Exp": ("EXP", None),
}
BINARY = {"Add": "ADD", "Sub": "SUB", "Mul": "MUL"}
SOFTMAX_GRID = Grid(1 / 256, -128)


def function(t: Translation, step: Step) -> None:
    """One operator of FUNCTIONS, in the layout that the tensor has."""
    node = step.node
    x = t.operand(step, node.inputs[0])
    kind, prescribed = FUNCTIONS[node.op_type]
    options: dict[str, float | bool] = {}
    if node.op_type == "LeakyRelu":
        options["alpha"] = node.attributes.get_float("alpha", 0.01)
    if node.op_type == "Gelu":
        options["approximate"] = node.attributes.get_string("approximate", "none") == "tanh"
    if node.op_type == "Elu" and node.attributes.get_float("alpha", 1.0) != 1.0:
        raise unsupported(node, "its alpha is not 1")
    grid = step.result.grid and (prescribed or step.result.grid)
    t.write(step, kind, [x], replace(x, grid=grid), **options)


def clip(t: Translation, step: Step) -> None:
    """A Relu or Clip that is fused to nothing: cut on the codes; RELU, RELU6 on floats."""
    node = step.node
    limits = bounds(node)
    if limits is None:
        raise unsupported(node, "its bounds are computed")
    x = t.operand(step, node.inputs[0])
    if x.grid is not None:
        result = step.result
        low, high = max(result.low, limits[0]), min(result.high, limits[1])
        t.keep(replace(result, low=low, high=high), x)
        return
    kinds = {(0.0, np.inf): "RELU", (0.0, 6.0): "RELU6"}
    if limits in kinds:
        t.write(step, kinds[limits], [x], x)
        return
    t.keep(step.result, t.cut(x, *limits, name_of(step.result.value)))


def hard_sigmoid(t: Translation, step: Step) -> None:
    """clip(a·x + b, 0, 1) as (x + b/a) cut to 0 … 1/a, times a; the product moves no code.

    The sum is stored on the output's grid divided by a, which mostly ends where the cut is.
    """
    node = step.node
    x = t.operand(step, node.inputs[0])
    a = node.attributes.get_float("alpha", 0.2)
    b = node.attributes.get_float("beta", 0.5)
    if a <= 0:
        raise unsupported(node, "its slope is not positive")
    name = name_of(step.result.value)
    final = step.result.grid
    wide = None if final is None else Grid(float(np.float32(final.scale / a)), final.zero_point)
    shift, slope = (np.array(v, np.float32) for v in (b / a, a))
    shifted = t.constant_operand(step, shift, f"{name}/shift", False)
    total = t.emit("ADD", [x, shifted], replace(x, grid=wide), f"{name}/shifted")
    total = t.cut(total, 0.0, 1 / a, f"{name}/cut")
    factor = t.constant_operand(step, slope, f"{name}/slope", False)
    t.write(step, "MUL", [total, factor], replace(x, grid=final))


def binary(t: Translation, step: Step) -> None:
    """Add, Sub, Mul (and Div of floats) of two tensors, or of one and a constant."""
    node = step.node
    tensors = [value for value in node.inputs if not is_constant(value)]
    rank = len(step.shape)
    last = rank in (3, 4) and any(t.is_last(value) for value in tensors)
    if any(len(t.read(value).shape) != rank for value in tensors):
        last = False
    operands: list[Place | int] = []
    for value in node.inputs:
        array = constant_of(value)
        if array is None:
            operands.append(t.operand(step, value, last))
        else:
            operands.append(t.constant_operand(step, array, f"{node.name}/constant", last))
    kind = "DIV" if node.op_type == "Div" else BINARY[node.op_type]
    if kind == "DIV" and step.result.grid is not None:
        raise unsupported(node, "tflite has no division of int8 tensors")
    t.write(step, kind, operands, Place(0, step.shape, step.result.grid, last))


def softmax(t: Translation, step: Step) -> None:
    """Over the axis that is stored last, wherever that is."""
    node = step.node
    x = t.operand(step, node.inputs[0])
    axis = node.attributes.get_int("axis", -1)
    if x.axis(axis) != len(x.stored_shape) - 1:
        other = not x.channels_last
        if len(x.shape) not in (3, 4):
            raise unsupported(node, "its axis is not the last")
        x = t.operand(step, node.inputs[0], other)
        if x.axis(axis) != len(x.stored_shape) - 1:
            raise unsupported(node, "its axis is neither the last nor that of the channels")
    grid = None if step.result.grid is None else SOFTMAX_GRID
    t.write(step, "SOFTMAX", [x], replace(x, grid=grid), beta=1.0)
