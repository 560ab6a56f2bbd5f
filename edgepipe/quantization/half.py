"""Weights in half precision, arithmetic in float32: the ``fp16`` recipe of CPU targets.

The constant weight of every linear operator (Conv, ConvTranspose, Gemm, MatMul) becomes a FLOAT16
initializer behind a Cast, rounded to nearest, ties to even (IEEE 754). Biases and every other
constant stay float32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.quantization.graph import Array, constant, is_op, name_of

STAGE = "quantization.half"

_LARGEST = float(np.finfo(np.float16).max)


def apply(model: ir.Model, context: Context) -> ir.Model:
    """Round the weights of a copy of ``model``, the result of ``edgepipe.passes.run``.

    Raises UserError, naming the tensor, for a weight that half precision cannot hold. A weight
    of which most nonzero values vanish is a warning.
    """
    result = model.clone()
    graph = result.graph
    taken = {v.name for n in graph.all_nodes() for v in n.outputs} | {*graph.initializers}
    taken |= {v.name for v in graph.inputs}
    halves: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        for index in (0, 1) if node.op_type == "MatMul" else (1,):
            weight = node.inputs[index]
            array = constant(weight)
            if weight is None or array is None or array.dtype != np.float32:
                continue
            if weight not in halves:
                halves[weight] = _cast(graph, node, weight, _rounded(weight, array, context), taken)
            node.replace_input_with(index, halves[weight])
    for weight in halves:
        if not weight.uses() and not weight.is_graph_output():
            graph.initializers.pop(name_of(weight), None)
    return result


def _rounded(weight: ir.Value, array: Array, context: Context) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        worst = array[~np.isfinite(half)][0]
        raise UserError(
            f"weight {worst:g} is beyond half precision, which ends at {_LARGEST:g}",
            where=name_of(weight),
            fix="choose recipe fp32, or w8a16 which scales its weights",
        )
    lost = np.count_nonzero(array) - np.count_nonzero(half)
    if 2 * lost > np.count_nonzero(array):
        context.warn(
            STAGE,
            weight.name,
            f"{lost} of {array.size} weights are below half precision and become 0",
        )
    return half


def _cast(
    graph: ir.Graph, reader: ir.Node, weight: ir.Value, half: Array, taken: set[str | None]
) -> ir.Value:
    """A FLOAT16 initializer and the Cast behind it, in front of ``reader``."""
    stored, restored = _fresh(f"{weight.name}/half", taken), _fresh(f"{weight.name}/float", taken)
    value = ir.Value(
        name=stored,
        shape=ir.Shape(half.shape),
        type=ir.TensorType(ir.DataType.FLOAT16),
        const_value=ir.tensor(half, name=stored),
    )
    graph.register_initializer(value)
    cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{restored}/Cast")
    result = cast.outputs[0]
    result.name, result.shape = restored, value.shape
    result.type = ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(reader, cast)
    return result


def _fresh(hint: str, taken: set[str | None]) -> str:
    name, count = hint, 0
    while name in taken:
        name, count = f"{hint}_{count}", count + 1
    taken.add(name)
    return name
