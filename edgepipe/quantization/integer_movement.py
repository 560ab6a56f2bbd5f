"""Operators that move, select or average codes, for the integer interpreter."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.quantization import integer_ops, linear_resize
from edgepipe.quantization.float_node import FloatNodes
from edgepipe.quantization.graph import Array, is_op
from edgepipe.quantization.interpreter import Sum, Term
from edgepipe.quantization.layers import conv_pads
from edgepipe.quantization.placement import MOVEMENT

LOWEST = -(2**24) + 1
_float_nodes = FloatNodes()


def move(node: ir.Node, term: Term, inputs: list[Any]) -> list[Any] | None:
    """The result for one tensor of codes (zero point taken off), or None for other operators."""
    between = term.integers.dtype.kind == "f"  # what a Resize interpolated lies between codes
    if is_op(node, "GlobalAveragePool", "AveragePool", "ReduceMean"):
        return None if between else _average(node, term, inputs)
    if is_op(node, "Concat"):
        return _concat(node, inputs)
    if is_op(node, "Pad") and not _pads_zero(inputs):
        return None
    if node.op_type not in MOVEMENT or (is_op(node, "MaxPool") and len(node.outputs) > 1):
        return None
    if linear_resize.unfit(node) is None:
        resized = linear_resize.interpolate(node, term.integers.astype(np.float32))
        return [Sum((Term(resized, term.scale),))]
    # Codes are at most 2^24 away from zero, so float32 carries them exactly.
    arrays = [term.integers.astype(np.float32), *inputs[1:]]
    found = _float_nodes.run(node, arrays)
    if is_op(node, "Resize"):
        between |= node.attributes.get_string("mode", "nearest") != "nearest"
    results = found if between else [np.asarray(a).astype(np.int32) for a in found]
    return [Sum((Term(array, term.scale),)) for array in results]


def _pads_zero(inputs: list[Any]) -> bool:
    return len(inputs) < 3 or inputs[2] is None or float(np.asarray(inputs[2]).reshape(())) == 0.0


def _concat(node: ir.Node, inputs: list[Any]) -> list[Any] | None:
    terms = [x.single if isinstance(x, Sum) else None for x in inputs]
    known = [t for t in terms if t is not None]
    if len(known) < len(terms) or len({float(t.scale) for t in known}) > 1:
        return None
    axis = node.attributes.get_int("axis", 0)
    return [Sum((Term(np.concatenate([t.integers for t in known], axis), known[0].scale),))]


def _average(node: ir.Node, term: Term, inputs: list[Any]) -> list[Any]:
    x = term.integers
    if is_op(node, "ReduceMean"):
        axes = inputs[1] if len(inputs) > 1 and inputs[1] is not None else range(x.ndim)
        keep = bool(node.attributes.get_int("keepdims", 1))
        return _mean(node, term, tuple(int(a) % x.ndim for a in axes), keep)
    if is_op(node, "GlobalAveragePool"):
        return _mean(node, term, tuple(range(2, x.ndim)), True)
    kernel = tuple(node.attributes.get_ints("kernel_shape"))
    strides = tuple(node.attributes.get_ints("strides", (1,) * len(kernel)))
    dilations = tuple(node.attributes.get_ints("dilations", (1,) * len(kernel)))
    pads = list(conv_pads(node, kernel, x.shape[2:], strides, dilations))
    spatial = len(kernel)
    counted = np.ones((1, 1, *x.shape[2:]), np.int32)
    if node.attributes.get_int("count_include_pad", 0):
        edges = zip(pads[:spatial], pads[spatial:], strict=True)
        counted = np.pad(counted, [(0, 0), (0, 0), *edges], constant_values=1)
    shape = node.outputs[0].shape
    assert shape is not None
    # ceil_mode: windows that start inside may reach past the end, where nothing is counted.
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    extra = [
        max((int(o) - 1) * s + r - (n + a + b), 0)
        for o, s, r, n, a, b in zip(
            shape[2:], strides, reach, x.shape[2:], pads[:spatial], pads[spatial:], strict=True
        )
    ]
    ends = [b + e for b, e in zip(pads[spatial:], extra, strict=True)]
    total = _window_sums(x, kernel, strides, dilations, (*pads[:spatial], *ends))
    include = node.attributes.get_int("count_include_pad", 0)
    around = (*(0,) * spatial, *extra) if include else (*pads[:spatial], *ends)
    counts = _window_sums(counted, kernel, strides, dilations, around)
    scale = np.asarray(term.scale / counts.astype(np.float32), np.float32)
    if (counts == counts.flat[0]).all():
        scale = np.asarray(term.scale / np.float32(counts.flat[0]), np.float32)
    return [Sum((Term(integer_ops.to_int32(total, node.name), scale),))]


def _window_sums(
    x: Array,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
) -> Array:
    windows = integer_ops.sliding(x, kernel, strides, dilations, pads, 0)
    result: Array = windows.sum(tuple(range(-len(kernel), 0)), dtype=np.int64)
    return result


def _mean(node: ir.Node, term: Term, axes: tuple[int, ...], keep: bool) -> list[Any]:
    total = term.integers.sum(axes, keepdims=keep, dtype=np.int64)
    count = np.float32(np.prod([term.integers.shape[a] for a in axes]))
    scale = np.asarray(term.scale / count, np.float32)
    return [Sum((Term(integer_ops.to_int32(total, node.name), scale),))]
