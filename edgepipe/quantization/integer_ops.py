"""Exact integer products in NumPy: what a kernel's int32 accumulator holds.

Products run in float64 matrix multiplication, exact below 2^53, and are checked against int32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.errors import EdgepipeError
from edgepipe.quantization.graph import Array
from edgepipe.quantization.layers import conv_pads


class Overflow(EdgepipeError):
    """An accumulator left int32: the graph's scales are wrong."""


def to_int32(sums: Array, where: str | None) -> Array:
    """Float64 or int64 sums as int32; raises Overflow outside."""
    if sums.size and (sums.max() > 2**31 - 1 or sums.min() < -(2**31)):
        raise Overflow(f"the accumulator of '{where}' overflows int32")
    return sums.astype(np.int32)


def convolve(node: ir.Node, x: Array, weight: Array) -> Array:
    """Conv of integers [N, C, …] (zero points taken off) with weights [O, C / group, …]."""
    group, kernel = node.attributes.get_int("group", 1), weight.shape[2:]
    strides = tuple(node.attributes.get_ints("strides", (1,) * len(kernel)))
    dilations = tuple(node.attributes.get_ints("dilations", (1,) * len(kernel)))
    pads = conv_pads(node, kernel, x.shape[2:], strides, dilations)
    windows = sliding(x, kernel, strides, dilations, pads, 0)
    n, c, *out = windows.shape[: 2 + len(kernel)]
    spatial = len(kernel)
    parts = windows.reshape(n, group, c // group, *windows.shape[2:])
    # [N, G, out…, C/G, kernel…]
    order = (0, 1, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
    rows = parts.transpose(order).reshape(n, group, int(np.prod(out)), -1).astype(np.float64)
    matrix = weight.reshape(group, weight.shape[0] // group, -1).astype(np.float64)
    sums = np.einsum("ngrk,gok->ngor", rows, matrix, optimize=True)
    return to_int32(sums, node.name).reshape(n, weight.shape[0], *out)


def convolve_transposed(node: ir.Node, x: Array, weight: Array) -> Array:
    """ConvTranspose of integers with weights [C, O / group, …]: scatter of products."""
    group, kernel = node.attributes.get_int("group", 1), weight.shape[2:]
    spatial = len(kernel)
    strides = tuple(node.attributes.get_ints("strides", (1,) * spatial))
    dilations = tuple(node.attributes.get_ints("dilations", (1,) * spatial))
    pads = tuple(node.attributes.get_ints("pads", (0,) * (2 * spatial)))
    shape = node.outputs[0].shape
    assert shape is not None, "a canonical graph has static shapes"
    out = [int(d) for d in shape[2:]]  # type: ignore[arg-type]
    full = [
        (n - 1) * s + (k - 1) * d + 1
        for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    wide = [max(f, p + o) for f, p, o in zip(full, pads[:spatial], out, strict=True)]
    sums = np.zeros((x.shape[0], group, weight.shape[1], *wide))
    data = x.reshape(x.shape[0], group, -1, *x.shape[2:]).astype(np.float64)
    split = weight.reshape(group, -1, *weight.shape[1:]).astype(np.float64)
    for tap in np.ndindex(*kernel):
        product = np.einsum("ngc...,gco->ngo...", data, split[(..., *tap)], optimize=True)
        place = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilations, x.shape[2:], strides, strict=True)
        )
        sums[(slice(None), slice(None), slice(None), *place)] += product
    crop = tuple(slice(p, p + o) for p, o in zip(pads[:spatial], out, strict=True))
    cropped = sums[(slice(None), slice(None), slice(None), *crop)]
    return to_int32(cropped, node.name).reshape(x.shape[0], group * weight.shape[1], *out)


def multiply(node: ir.Node, a: Array, b: Array) -> Array:
    """Gemm (``transB`` applied here) or MatMul of integers."""
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
        b = b.T
    return to_int32(a.astype(np.float64) @ b.astype(np.float64), node.name)


def sliding(
    x: Array,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
    fill: int,
) -> Array:
    """Windows [N, C, out…, kernel…] of integers padded with ``fill``."""
    spatial = len(kernel)
    edges = zip(pads[:spatial], pads[spatial:], strict=True)
    padded = np.pad(x, [(0, 0), (0, 0), *edges], constant_values=fill)
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, 2 + spatial)))
    steps = [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    return windows[(slice(None), slice(None), *steps)]
