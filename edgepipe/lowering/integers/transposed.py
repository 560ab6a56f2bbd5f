"""Transposed convolutions of codes as one convolution and a shuffle of its channels to pixels.

With strides s × s every output pixel of one *phase* (row mod s, column mod s) is the same
convolution of the input: all s² phases side by side are one convolution with s² times the channels,
and DepthToSpace puts them in place (sub-pixel convolution, Shi et al. 2016, arXiv 1609.05158, read
backwards). Taps that a phase does not have weigh zero.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgepipe.lowering.anchors import ints
from edgepipe.lowering.integers.terms import DOMAIN, META, ZERO, Weights, integer_of
from edgepipe.quantization.edit import Names
from edgepipe.quantization.graph import Array, dims


def split(graph: ir.Graph) -> None:
    """Rewrite every transposed convolution of ``graph`` that allows it."""
    names = Names(graph)
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "ConvTranspose" and _allows(node):
            _split(graph, node, names)


def _allows(node: ir.Node) -> bool:
    integer, result = integer_of(node), dims(node.outputs[0])
    if integer.term.weights is None or integer.residuals or result is None or len(result) != 4:
        return False
    strides = ints(node, "strides", (1, 1))
    whole = strides[0] == strides[1] and not any(d % strides[0] for d in result[2:])
    plain = set(ints(node, "dilations", (1,))) == {1} and node.attributes.get_int("group", 1) == 1
    explicit = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    return whole and plain and explicit and "output_shape" not in node.attributes


def _split(graph: ir.Graph, node: ir.Node, names: Names) -> None:
    integer, value = integer_of(node), node.outputs[0]
    assert integer.term.weights is not None
    result = dims(value)
    assert result is not None
    n, co, *size = result
    stride = ints(node, "strides", (1, 1))[0]
    weights, begins = phases(
        integer.term.weights.codes, stride, ints(node, "pads", (0, 0, 0, 0))[:2]
    )
    count = stride * stride
    term = replace(
        integer.term,
        weights=Weights(weights, integer.term.weights.scale, 0),
        bias=None if integer.term.bias is None else np.tile(integer.term.bias, count),
    )
    first, *others = integer.multipliers
    if first.size > 1:
        first = np.tile(first.reshape(-1), count).reshape(1, -1, 1, 1)
    inner = [s // stride for s in size]
    source = dims(node.inputs[0])  # type: ignore[arg-type]
    assert source is not None
    kernel = weights.shape[2:]
    ends = [
        s + k - 1 - before - i
        for s, k, before, i in zip(inner, kernel, begins, source[2:], strict=True)
    ]
    if min(ends) < 0:  # rows at the end that nothing reads: rare, and left as it is
        return
    channels = ir.Value(
        name=names.fresh(f"{value.name}/phases"),
        shape=ir.Shape([n, count * co, *inner]),
        type=value.type,
    )
    if ZERO in value.meta:
        channels.meta[ZERO] = value.meta[ZERO]
    conv = ir.Node(
        DOMAIN, "Conv", node.inputs,
        [ir.AttrInt64s("kernel_shape", kernel), ir.AttrInt64s("pads", [*begins, *ends])],
        outputs=[channels], name=node.name,
    )  # fmt: skip
    # The general form computes what the term's node says.
    conv.meta[META] = replace(integer, term=replace(term, node=conv), multipliers=(first, *others))
    shuffle = ir.Node(
        "", "DepthToSpace", [channels], [ir.AttrInt64("blocksize", stride)],
        outputs=[ir.Value(name=value.name, shape=value.shape, type=value.type)],
        name=names.fresh(f"{node.name}/pixels"),
    )  # fmt: skip
    new = shuffle.outputs[0]
    new.meta.update(value.meta)
    graph.insert_before(node, [conv, shuffle])
    value.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def phases(codes: Array, stride: int, pads: tuple[int, ...]) -> tuple[Array, tuple[int, int]]:
    """Weights ``[ci, co, kh, kw]`` of a transposed convolution → ``[s² · co, ci, kh', kw']`` of a
    convolution, the phase varying slowest, and its padding at the top and left.

    Output o of a dimension is Σ x[i] w[o + p − s·i]: with o = s·u + v it reads input
    i = u + (v + p) // s − j through tap (v + p) mod s + s·j.
    """
    taps = []
    for size, pad in zip(codes.shape[2:], pads, strict=True):
        reads = [
            {(v + pad) // stride - j: r + stride * j for j in range(-(-(size - r) // stride))}
            for v in range(stride)
            for r in [(v + pad) % stride]
        ]
        first = min((i for read in reads for i in read), default=0)
        last = max((i for read in reads for i in read), default=0)
        taps.append((reads, min(first, 0), max(last, 0)))
    (rows, top, bottom), (columns, left, right) = taps
    ci, co = codes.shape[:2]
    shape = (stride, stride, co, ci, bottom - top + 1, right - left + 1)
    result = np.zeros(shape, codes.dtype)
    for v, read in enumerate(rows):
        for w, other in enumerate(columns):
            for i, ky in read.items():
                for j, kx in other.items():
                    result[v, w, :, :, i - top, j - left] = codes[:, :, ky, kx].T
    return result.reshape(stride * stride * co, ci, *shape[4:]), (-top, -left)
