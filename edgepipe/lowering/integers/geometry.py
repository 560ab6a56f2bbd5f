"""How nodes over codes see their tensors, and the windows that they move over them.

A tensor is an *image* [n, c, h, w], stored NHWC with a border, or *rows* of its last dimension,
which is how it is stored anyway.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.kernels.layout import NO_PADS, Blocked, Pads
from edgepipe.lowering.anchors import ints
from edgepipe.lowering.integers.terms import DOMAIN, ZERO, integer_of
from edgepipe.quantization.graph import dims, is_op

CODES = (ir.DataType.INT8, ir.DataType.UINT8)
IMAGE, ROWS = "image", "rows"


def zero_of(value: ir.Value) -> int:
    """The zero point of a tensor of codes."""
    return int(value.meta.get(ZERO, 0))


def is_codes(value: ir.Value | None) -> bool:
    """Whether ``value`` holds codes of the integer lowering."""
    return value is not None and value.dtype in CODES and ZERO in value.meta


def shape(value: ir.Value | None) -> tuple[int, ...]:
    """Static shape; every value has one."""
    assert value is not None
    found = dims(value)
    assert found is not None, value.name
    return found


def view_of(node: ir.Node) -> str:
    """How a node sees its tensors."""
    if is_op(node, "MaxPool", "Resize", "Concat", "DepthToSpace") or node.op_type in (
        "Conv",
        "AveragePool",
        "GlobalAveragePool",
        "ReduceMean",
        "Resize",
    ):
        return IMAGE
    if node.op_type in ("MatMul", "Gemm"):
        return ROWS
    rank = len(shape(node.inputs[0]))
    if rank == 4 and _feeds_product(node.outputs[0]):  # attention: heads of rows
        return ROWS
    if rank == 3:  # a sequence of channels where a convolution reads it
        readers = [use.node for use in node.outputs[0].uses()]
        return IMAGE if any(r.op_type == "Conv" for r in readers) else ROWS
    return IMAGE if rank == 4 else ROWS


def _feeds_product(value: ir.Value) -> bool:
    readers = [use.node for use in value.uses()]
    return bool(readers) and all(r.op_type == "MatMul" for r in readers)


def four(value: ir.Value, view: str) -> tuple[int, int, int, int] | None:
    """[n, c, h, w] of a tensor under a view; None where it has none."""
    full = shape(value)
    if view == ROWS:
        return (1, full[-1], 1, int(np.prod(full[:-1]))) if full else None
    if len(full) == 3:
        return full[0], full[1], 1, full[2]
    return full if len(full) == 4 else None


def layout(value: ir.Value, view: str, lanes: int, pads: Pads = NO_PADS) -> Blocked:
    """How a group stores ``value``; ``lanes`` of float32 at most."""
    found = four(value, view)
    assert found is not None
    n, c, h, w = found
    # One or two channels are packed as they are: four bytes are then several taps of a row.
    held = c if c <= 2 else 4 if c <= 4 else -(-c // 8) * 8
    if view == ROWS:
        lanes = c
    elif is_codes(value):
        lanes = held
    else:  # no channels for which the codes it is made of have none; products fill vectors of 8
        least = 8 if _is_product(value) else 1
        while lanes > least and -(-c // lanes) * lanes > held:
            lanes //= 2
    dtype = "float32"
    if is_codes(value):
        assert value.dtype is not None
        dtype = str(value.dtype.numpy())
    return Blocked(n, c, h, w, lanes, pads, dtype, zero_of(value) if is_codes(value) else 0)


def _is_product(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.domain == DOMAIN and integer_of(node).term.kind == "product"


def plain(value: ir.Value, view: str) -> Blocked:
    """How ``value`` is stored in ONNX's own order."""
    if view == ROWS:
        return layout(value, view, 1)
    own = layout(value, view, 1)
    return Blocked(own.n, own.c, own.h, own.w, 1, NO_PADS, own.dtype, own.zero)


def data(node: ir.Node) -> list[ir.Value]:
    """The tensors a node computes on."""
    values = node.inputs if node.domain == DOMAIN or is_op(node, "Concat") else node.inputs[:1]
    return [v for v in values if v is not None]


def pair(node: ir.Node, name: str, default: int) -> tuple[int, int]:
    rank = len(shape(node.inputs[0])) - 2
    values = ints(node, name, (default,) * rank)
    return (values[0], values[1]) if rank == 2 else (default, values[0])


def begin(node: ir.Node) -> tuple[int, int]:
    rank = len(shape(node.inputs[0])) - 2
    pads = ints(node, "pads", (0,) * 2 * rank)
    return (pads[0], pads[1]) if rank == 2 else (0, pads[0])


def window(node: ir.Node) -> tuple[int, int]:
    if node.domain == DOMAIN and node.op_type == "Conv":
        weights = integer_of(node).term.weights
        assert weights is not None
        *_, kh, kw = (1, *weights.codes.shape[2:])
        return kh, kw
    return pair(node, "kernel_shape", 1)


def border(node: ir.Node) -> Pads:
    """The border that a convolution or average reads around its input."""
    if node.domain != DOMAIN or node.op_type not in ("Conv", "AveragePool"):
        return NO_PADS
    (kh, kw), (sy, sx), (dy, dx) = (
        window(node),
        pair(node, "strides", 1),
        pair(node, "dilations", 1),
    )
    top, left = begin(node)
    source, result = four(data(node)[0], IMAGE), four(node.outputs[0], IMAGE)
    assert source is not None and result is not None
    below = (result[2] - 1) * sy + (kh - 1) * dy + 1 - top - source[2]
    right = (result[3] - 1) * sx + (kw - 1) * dx + 1 - left - source[3]
    return top, left, max(below, 0), max(right, 0)
