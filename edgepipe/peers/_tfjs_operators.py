"""ONNX operators as TensorFlow.js calls, one function per group of operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe.peers._tfjs_products import conv, gemm, limits, matmul, padding

if TYPE_CHECKING:
    from edgepipe.peers._tfjs_graph import TfjsGraph

_UNARY = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Exp": "exp", "Sqrt": "sqrt",
          "Neg": "neg", "Abs": "abs", "Erf": "erf", "Reciprocal": "reciprocal", "Gelu": "gelu",
          "HardSwish": "hardSwish", "Softplus": "softplus", "Identity": "identity"}  # fmt: skip
_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow",
           "Max": "maximum", "Min": "minimum"}  # fmt: skip
#: Axis of a channels-first tensor → where it is channels last.
_PLACE = (0, 3, 1, 2)


def append(graph: TfjsGraph, node: Any) -> None:
    """The calls of ``node``. Raises UserError where there are none."""
    from edgepipe.peers._tfjs_graph import refusal

    if node.op_type in _UNARY:
        return _elementwise(graph, node, _UNARY[node.op_type])
    if node.op_type in _BINARY:
        return _binary(graph, node)
    if node.op_type not in _OTHERS or node.domain not in ("", "ai.onnx"):
        raise refusal(node)
    if why := _OTHERS[node.op_type](graph, node, _attributes(node)):
        raise refusal(node, why)
    return None


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _elementwise(graph: TfjsGraph, node: Any, op: str, **options: Any) -> None:
    name = node.input[0]
    graph.call(op, [name if name in graph.last else graph.as_stated(name)], node.output[0],
               **options)  # fmt: skip
    if name in graph.last:
        graph.last.add(node.output[0])


def _clip(graph: TfjsGraph, node: Any, _: dict[str, Any]) -> str:
    ends = limits(graph, node)
    if ends is None:
        return "with computed limits"
    if ends == (0, 6):
        _elementwise(graph, node, "relu6")
    else:
        _elementwise(graph, node, "clip", low=ends[0], high=ends[1])
    return ""


def _hard_sigmoid(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    _elementwise(graph, node, "hardSigmoid", alpha=given.get("alpha", 0.2),
                 beta=given.get("beta", 0.5))  # fmt: skip
    return ""


def _leaky_relu(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    _elementwise(graph, node, "leakyRelu", alpha=given.get("alpha", 0.01))
    return ""


def _binary(graph: TfjsGraph, node: Any) -> None:
    last = any(name in graph.last for name in node.input)
    inputs = [_beside_last(graph, n) if last else graph.as_stated(n) for n in node.input]
    graph.call(_BINARY[node.op_type], inputs, node.output[0])
    if last:
        graph.last.add(node.output[0])


def _beside_last(graph: TfjsGraph, name: str) -> str:
    """An operand that is broadcast against one with its channels last."""
    rank = len(graph.shapes[name])
    if rank == 4:
        return graph.channels_last(name)
    if rank == 0:
        return graph.as_stated(name)
    wide = (1,) * (4 - rank) + graph.shapes[name]
    if name in graph.constants:
        value = graph.constants[name].reshape(wide).transpose(0, 2, 3, 1)
        return graph.constant(f"{name}:wide", value)
    graph.shapes[f"{name}:wide"] = wide
    graph.call("reshape", [name], f"{name}:wide", shape=wide)
    return graph.channels_last(f"{name}:wide")


def _pool(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    pads, window = padding(given), list(given["kernel_shape"])
    name, average = graph.channels_last(node.input[0]), node.op_type == "AveragePool"
    if len(window) != 2 or pads is None or any(d != 1 for d in given.get("dilations", ())):
        return "with such windows or pads"
    if len(node.output) > 1 or given.get("ceil_mode"):
        return "with indices or ceil_mode"
    if average and pads != "valid" and given.get("count_include_pad"):
        if pads == "same":
            return "with auto_pad and count_include_pad"
        graph.call("pad", [name], f"{node.output[0]}:in", pads=pads, value=0)
        name, pads = f"{node.output[0]}:in", "valid"
    graph.call("avgPool" if average else "maxPool", [name], node.output[0], window=window, pad=pads,
               strides=list(given.get("strides", (1, 1))))  # fmt: skip
    graph.last.add(node.output[0])
    return ""


def _reduce(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    """Means and maxima over axes."""
    name, rank = node.input[0], len(graph.shapes[node.input[0]])
    whole = node.op_type.startswith("Global")
    axes = list(range(2, rank)) if whole else given.get("axes")
    if axes is None and len(node.input) > 1 and node.input[1] in graph.constants:
        axes = graph.constants[node.input[1]].tolist()
    if axes is None:
        return "over all or computed axes"
    axes, keep = [axis % rank for axis in axes], whole or bool(given.get("keepdims", 1))
    last = name in graph.last and (keep or set(axes) == {2, 3})
    source = name if last else graph.as_stated(name)
    places = [_PLACE[axis] for axis in axes] if last else axes
    graph.call("mean" if "Average" in node.op_type or "Mean" in node.op_type else "max", [source],
               node.output[0], axes=sorted(places), keep=keep)  # fmt: skip
    if last and keep:
        graph.last.add(node.output[0])
    return ""


def _reshape(graph: TfjsGraph, node: Any, _: dict[str, Any]) -> str:
    shape = graph.shapes.get(node.output[0])
    if shape is None or not all(shape):
        return "to a computed shape"
    graph.call("reshape", [graph.as_stated(node.input[0])], node.output[0], shape=shape)
    return ""


def _transpose(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    axes = given.get("perm") or list(range(len(graph.shapes[node.input[0]])))[::-1]
    graph.call("transpose", [graph.as_stated(node.input[0])], node.output[0], axes=list(axes))
    return ""


def _concat(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    axis, last = given["axis"], any(name in graph.last for name in node.input)
    axis %= len(graph.shapes[node.input[0]])
    inputs = [graph.channels_last(n) if last else graph.as_stated(n) for n in node.input]
    graph.call("concat", inputs, node.output[0], axis=_PLACE[axis] if last else axis)
    if last:
        graph.last.add(node.output[0])
    return ""


def _part(graph: TfjsGraph, name: str, output: str, axis: int, start: int) -> None:
    """The part of ``name`` from ``start`` on along ``axis``, as long as ``output``."""
    last, shape = name in graph.last, graph.shapes[name]
    begin, size = [0] * len(shape), list(shape)
    begin[axis], size[axis] = start, graph.shapes[output][axis]
    if last:
        begin, size = ([row[axis] for axis in (0, 2, 3, 1)] for row in (begin, size))
        graph.last.add(output)
    graph.call("slice", [name if last else graph.as_stated(name)], output, begin=begin, size=size)


def _slice(graph: TfjsGraph, node: Any, _: dict[str, Any]) -> str:
    name, output, shape = node.input[0], node.output[0], graph.shapes[node.input[0]]
    given = [graph.constants.get(row) for row in node.input[1:]]
    starts, axes = given[0], given[2] if len(given) > 2 else None
    steps = given[3] if len(given) > 3 else np.ones(1)
    if starts is None or axes is None or steps is None or starts.size != 1 or np.any(steps != 1):
        return "of several axes, in steps or from computed places"
    axis, start = int(axes[0]) % len(shape), int(starts[0])
    start = min(start, shape[axis]) if start >= 0 else max(start + shape[axis], 0)
    _part(graph, name, output, axis, start)
    return ""


def _split(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    axis, start = given.get("axis", 0) % len(graph.shapes[node.input[0]]), 0
    for output in node.output:
        _part(graph, node.input[0], output, axis, start)
        start += graph.shapes[output][axis]
    return ""


def _gather(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    """One index: a part of length 1."""
    name, index = node.input[0], graph.constants.get(node.input[1])
    if index is None or index.size != 1 or name in graph.constants:
        return "of several or computed places"
    shape, output = graph.shapes[name], node.output[0]
    axis = given.get("axis", 0) % len(shape)
    graph.shapes[f"{output}:one"] = tuple(1 if i == axis else n for i, n in enumerate(shape))
    _part(graph, name, f"{output}:one", axis, int(index.item()) % shape[axis])
    graph.call("reshape", [graph.as_stated(f"{output}:one")], output, shape=graph.shapes[output])
    return ""


def _softmax(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    rank = len(graph.shapes[node.input[0]])
    axis, last = given.get("axis", -1) % rank, node.input[0] in graph.last
    if last and axis == 1:
        _elementwise(graph, node, "softmax")
        return ""
    if axis != rank - 1:
        return f"over axis {axis}"
    graph.call("softmax", [graph.as_stated(node.input[0])], node.output[0])
    return ""


def _layer_norm(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    rank = len(graph.shapes[node.input[0]])
    if given.get("axis", -1) % rank != rank - 1 or len(node.output) > 1:
        return "over several axes"
    inputs = [graph.as_stated(name) for name in node.input if name]
    graph.call("layerNorm", inputs, node.output[0], epsilon=given.get("epsilon", 1e-5))
    return ""


def _batch_norm(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    if any(name not in graph.constants for name in node.input[1:]):
        return "with computed statistics"
    scale, shift, mean, variance = (graph.constants[n].astype(np.float64) for n in node.input[1:])
    factor = scale / np.sqrt(variance + given.get("epsilon", 1e-5))
    if len(graph.shapes[node.input[0]]) != 4:
        return "of other than four axes"
    name, output = graph.channels_last(node.input[0]), node.output[0]
    graph.call("mul", [name, graph.constant(f"{output}:a", factor)], f"{output}:m")
    shift = shift - mean * factor
    graph.call("add", [f"{output}:m", graph.constant(f"{output}:b", shift)], output)
    graph.last.add(output)
    return ""


def _resize(graph: TfjsGraph, node: Any, given: dict[str, Any]) -> str:
    if len(graph.shapes[node.input[0]]) != 4:
        return "of other than four axes"
    mode = given.get("mode", b"nearest")
    where = given.get("coordinate_transformation_mode", b"half_pixel")
    upsample = node.op_type == "Upsample"
    places = {b"asymmetric": (False, False), b"align_corners": (True, False),
              b"half_pixel": (False, True), b"pytorch_half_pixel": (False, True)}  # fmt: skip
    if mode not in (b"nearest", b"linear") or where not in places:
        return f"with {mode.decode()}, {where.decode()}"
    corners, half = (False, False) if upsample else places[where]
    graph.call("nearest" if mode == b"nearest" else "bilinear",
               [graph.channels_last(node.input[0])], node.output[0], corners=corners, half=half,
               size=graph.shapes[node.output[0]][2:])  # fmt: skip
    graph.last.add(node.output[0])
    return ""


_OTHERS: dict[str, Callable[[TfjsGraph, Any, dict[str, Any]], str]] = {
    "Clip": _clip, "HardSigmoid": _hard_sigmoid, "LeakyRelu": _leaky_relu, "Conv": conv,
    "Gemm": gemm, "MatMul": matmul, "MaxPool": _pool, "AveragePool": _pool,
    "GlobalAveragePool": _reduce, "GlobalMaxPool": _reduce, "ReduceMean": _reduce,
    "ReduceMax": _reduce, "Reshape": _reshape, "Flatten": _reshape, "Squeeze": _reshape,
    "Unsqueeze": _reshape, "Transpose": _transpose, "Concat": _concat, "Softmax": _softmax,
    "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm, "Resize": _resize,
    "Upsample": _resize, "Slice": _slice, "Split": _split, "Gather": _gather,
}  # fmt: skip
