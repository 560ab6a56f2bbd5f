"""Products of ONNX as TensorFlow.js calls, with what its kernels compute along: bias, activation.

Each function appends calls and returns "", or says what has no counterpart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from edgepipe.peers._tfjs_graph import TfjsGraph


def limits(graph: TfjsGraph, node: Any) -> tuple[float, float] | None:
    """Of a Clip; None where they are computed."""
    found = []
    for i, default in ((1, -3.4e38), (2, 3.4e38)):
        name = node.input[i] if len(node.input) > i else ""
        if name and name not in graph.constants:
            return None
        found.append(float(graph.constants[name].item()) if name else default)
    return found[0], found[1]


def _activation(graph: TfjsGraph, name: str) -> tuple[str, str]:
    """The activation that follows ``name`` and can be part of it, and where it ends."""
    node = graph.sole_consumer(name)
    kind = {"Relu": "relu", "Sigmoid": "sigmoid"}.get(node.op_type if node else "", "")
    if node is not None and node.op_type == "Clip" and limits(graph, node) == (0, 6):
        kind = "relu6"
    if not kind:
        return "linear", name
    graph.done.add(node.output[0])
    return kind, node.output[0]


def padding(given: dict[str, Any]) -> Any:
    """ "valid", "same", explicit ones, or None for what TensorFlow.js does not know."""
    mode = given.get("auto_pad", b"NOTSET")
    if mode != b"NOTSET":
        return {b"SAME_UPPER": "same", b"VALID": "valid"}.get(mode)
    top, left, bottom, right = given.get("pads") or (0, 0, 0, 0)
    if not top + left + bottom + right:
        return "valid"
    return [[0, 0], [top, bottom], [left, right], [0, 0]]


def conv(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    """Dense or depthwise, with bias and activation; why not, where it is neither."""
    weight = graph.constants.get(node.input[1])
    if weight is None or weight.ndim != 4:
        return "with computed weights" if weight is None else f"over {weight.ndim - 2} axes"
    pads, group = padding(given), given.get("group", 1)
    depthwise = group == graph.shapes[node.input[0]][1] and group > 1
    if pads is None or (group > 1 and not depthwise):
        return f"with {group} groups" if pads is not None else "with pads on the lower side"
    if depthwise:
        kernel = weight.reshape(group, -1, *weight.shape[2:]).transpose(2, 3, 0, 1)
    else:
        kernel = weight.transpose(2, 3, 1, 0)
    inputs = [graph.channels_last(node.input[0]), graph.constant(f"{node.input[1]}:k", kernel)]
    if len(node.input) > 2 and node.input[2]:
        inputs.append(graph.as_stated(node.input[2]))
    activation, output = _activation(graph, node.output[0])
    graph.call("depthwise" if depthwise else "conv", inputs, output, activation=activation,
               pad=pads, strides=list(given.get("strides", (1, 1))),
               dilations=list(given.get("dilations", (1, 1))))  # fmt: skip
    graph.last.add(output)
    return ""


def gemm(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    """A product with constant weights, with bias and activation."""
    weight = graph.constants.get(node.input[1])
    if weight is None or given.get("transA") or given.get("alpha", 1) != 1:
        return "with computed weights, transA or alpha"
    weight = weight.T if given.get("transB") else weight
    inputs = [graph.as_stated(node.input[0]), graph.constant(f"{node.input[1]}:k", weight)]
    if len(node.input) > 2 and node.input[2]:
        bias = graph.constants.get(node.input[2])
        if bias is None or given.get("beta", 1) != 1 or bias.size not in (1, weight.shape[1]):
            return "with such a bias"
        spread = np.broadcast_to(bias.reshape(-1), weight.shape[1:])
        inputs.append(graph.constant(f"{node.input[2]}:b", spread))
    activation, output = _activation(graph, node.output[0])
    graph.call("dense", inputs, output, activation=activation, shape=graph.shapes[output])
    return ""


def matmul(graph: TfjsGraph, node: Any, _: dict[str, Any]) -> str:
    """The same with more axes on the left, or of two activations."""
    left, right = node.input
    output = node.output[0]
    if right not in graph.constants or len(graph.shapes[right]) != 2:
        if min(len(graph.shapes[name]) for name in node.input) < 2:
            return "of a vector"
        graph.call("matMul", [graph.as_stated(left), graph.as_stated(right)], output)
        return ""
    inputs = [graph.as_stated(left), graph.as_stated(right)]
    activation, output = _activation(graph, output)
    graph.call("dense", inputs, output, activation=activation, shape=graph.shapes[output])
    return ""
