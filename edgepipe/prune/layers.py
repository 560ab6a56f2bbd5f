"""Gives a layer the weights that are left of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array, dims
from edgepipe.quantization.layers import Layer
from edgepipe.sparsity import pruning
from edgepipe.sparsity.pattern import Pattern


def macs(node: ir.Node) -> int:
    """Multiplications of a linear operator per inference, zeros among them."""
    layer, shape = Layer.of(node), dims(node.outputs[0])
    return int(np.prod(shape or (0,))) * (int(np.prod(layer.weight_shape)) // layer.outputs)


def scores(layer: Layer, gram: Gram | None) -> Array:
    """What each weight is worth, float64 [outputs, inputs, taps]: its square, times that of its
    input where ``gram`` knows it (Wanda)."""
    found: Array = layer.matrix(layer.weight)[0].astype(np.float64) ** 2
    if gram is not None:
        found = found * (np.diagonal(gram.hessian[0]) + gram.mean_x[0] ** 2)
    taps = int(np.prod(layer.weight_shape[2:]))
    return found.reshape(layer.outputs, -1, taps)


def kept(layer: Layer, pattern: Pattern, gram: Gram | None) -> Array:
    """Which weights stay under ``pattern``, bool [outputs, K]."""
    found: Array = pruning.mask(scores(layer, gram), pattern)
    if gram is not None:
        weight = layer.matrix(layer.weight)[0]
        found = pruning.settled(found, pattern, weight, *equations(layer, gram))
    return found.reshape(layer.outputs, -1)


def solution(layer: Layer, stays: Array, gram: Gram | None) -> tuple[Array, Array | None]:
    """Weights [outputs, K] where ``stays`` (bool, the same shape) and zeros elsewhere, and the bias
    where there is one to set: with ``gram``, fitted to the output that it knows."""
    weight = layer.matrix(layer.weight)[0]
    if gram is None:
        return np.where(stays, weight, np.float32(0)), None
    result = pruning.refit(weight, stays, *equations(layer, gram))
    if layer.node.op_type == "MatMul":
        return result, None
    bias: Array = gram.mean_y[0] - result.astype(np.float64) @ gram.mean_x[0]
    return result, bias.astype(np.float32)


def equations(layer: Layer, gram: Gram) -> tuple[Array, Array]:
    """Moments of the input, and of what is wanted with it."""
    hessian, cross, mean_x = gram.hessian[0], gram.cross[0], gram.mean_x[0]
    if layer.node.op_type == "MatMul":  # without a bias the means are the weights' to fit
        return hessian + np.outer(mean_x, mean_x), cross + np.outer(gram.mean_y[0], mean_x)
    return hessian, cross


def set_weight(node: ir.Node, stays: Array, gram: Gram | None) -> float:
    """Prune ``node`` to the places ``stays``; returns the share of zeros it has then."""
    layer = Layer.of(node)
    result, bias = solution(layer, stays, gram)
    if bias is not None:
        replace(node, 2, bias)
    replace(node, 1, layer.restore(result))
    return round(1 - float(np.count_nonzero(result)) / result.size, 4)


def replace(node: ir.Node, index: int, array: Array) -> None:
    """Give ``node`` an initializer of its own with ``array`` as input ``index``; floats in the
    dtype of its weights."""
    graph, like = node.graph, node.inputs[1]
    assert graph is not None
    if array.dtype.kind == "f" and like is not None and like.dtype is not None:
        array = array.astype(like.dtype.numpy())
    taken = set(graph.initializers) | {v.name for n in graph for v in n.outputs}
    name = f"{node.outputs[0].name}/{'bias' if index == 2 else 'pruned'}"
    while name in taken:
        name += "_"
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    old = node.inputs[index] if index < len(node.inputs) else None
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if old is not None and old.name and not old.uses() and old.is_initializer():
        del graph.initializers[old.name]
