"""Linear operators as matrices: weights [groups, outputs, K] and patches [groups, rows, K].

A convolution with ``group`` g is g independent products: rows are output pixels of all samples, K
is input channels of the group × kernel taps, in the weight's own order. Gemm and MatMul are one
group. So one solver serves regular, grouped and depthwise convolutions and dense layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.graph import Array, constant, dims
from edgepipe.quantization.placement import output_channels
from edgepipe.sparsity.pattern import Pattern

#: Rows of a dense layer that is pruned by blocks: kernels work on many at once.
LEAST_ROWS = 16
#: Weights of a dense layer of one row that is pruned, by itself and by blocks (codes): a megabyte,
#: as less stays in the caches of a core, where the dense kernel is as fast.
LEAST_WEIGHTS, LEAST_CODES = 250_000, 1_000_000
#: Share of its weights that may stay for the kernel over gathered inputs to be faster.
MOST_DENSITY = 1 / 3


def prunable(graph: ir.Graph, pattern: Pattern | None) -> list[ir.Node]:
    """Layers that sparse kernels run under ``pattern``, None for any: convolutions of one group but
    those that read an input of the graph; large dense layers of one row, of whose weights few stay,
    each wherever it is; by blocks, dense layers of many rows too."""
    blocks = pattern is None or pattern.block > 1
    few = pattern is None or pattern.auto or pattern.density <= MOST_DENSITY
    one_row = few and (pattern is None or pattern.shared == 1)
    least = LEAST_CODES if pattern is not None and pattern.block > 1 else LEAST_WEIGHTS
    inputs = set(graph.inputs)

    def fits(node: ir.Node) -> bool:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            return False
        weight, shape = constant(node.inputs[1]), dims(node.outputs[0])
        if weight is None:
            return False
        if node.op_type == "Conv":
            return node.attributes.get_int("group", 1) == 1 and node.inputs[0] not in inputs
        if shape is None or weight.ndim != 2:
            return False
        rows = int(np.prod(shape[:-1]))
        large = rows == 1 and weight.size >= least
        return (one_row and large) or (blocks and rows >= LEAST_ROWS)

    return [node for node in graph if fits(node)]


@dataclass(frozen=True)
class Layer:
    """Geometry of one linear operator. Build with ``Layer.of``."""

    node: ir.Node
    groups: int
    outputs: int
    weight_shape: tuple[int, ...]
    transposed: bool

    @classmethod
    def of(cls, node: ir.Node) -> Layer:
        """The layer of a node that ``placement.weight_of`` accepts."""
        weight = constant(node.inputs[1])
        assert weight is not None
        convolution = node.op_type in ("Conv", "ConvTranspose")
        groups = node.attributes.get_int("group", 1) if convolution else 1
        transposed = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
        )
        return cls(node, groups, output_channels(node, weight), weight.shape, transposed)

    @property
    def weight(self) -> Array:
        """The float weight in ONNX layout."""
        array = constant(self.node.inputs[1])
        assert array is not None
        return array

    @property
    def bias(self) -> Array:
        """Float32 bias [outputs]; zeros where the node has none."""
        return self.bias_of(self.node, self.outputs)

    @staticmethod
    def bias_of(node: ir.Node, outputs: int) -> Array:
        """Float32 bias [outputs] of a linear operator."""
        array = constant(node.inputs[2] if len(node.inputs) > 2 else None)
        zeros = np.zeros(outputs, np.float32)
        return zeros if array is None else np.asarray(array, np.float32).reshape(-1)

    @property
    def axis(self) -> int:
        """Axis of the output channels in the ONNX weight (per group for ConvTranspose)."""
        return 1 if self.transposed or self.node.op_type == "ConvTranspose" else 0

    @property
    def input_axis(self) -> int:
        """Axis of the input channels (of one group, for Conv) in the ONNX weight."""
        return 0 if self.axis == 1 else 1

    @property
    def has_columns(self) -> bool:
        """Whether ``patches`` knows this operator (ConvTranspose has no im2col here)."""
        return self.node.op_type != "ConvTranspose"

    def matrix(self, weight: Array) -> Array:
        """ONNX layout → [groups, outputs / groups, K].

        ConvTranspose shares one scale among its groups (the ONNX weight has no other axis for
        it), so there all groups are one: [1, outputs / groups, inputs × taps].
        """
        if self.node.op_type == "ConvTranspose":
            return np.moveaxis(weight, 1, 0).reshape(1, self.weight_shape[1], -1)
        array = weight.T if self.transposed else weight
        return array.reshape(self.groups, self.outputs // self.groups, -1)

    def restore(self, matrix: Array) -> Array:
        """The inverse of ``matrix``."""
        if self.node.op_type == "ConvTranspose":
            inputs, per_group, *taps = self.weight_shape
            return np.ascontiguousarray(np.moveaxis(matrix.reshape(per_group, inputs, *taps), 0, 1))
        if self.transposed:
            return np.ascontiguousarray(matrix.reshape(self.outputs, -1).T)
        return np.ascontiguousarray(matrix).reshape(self.weight_shape)

    def patches(self, x: Array, rows: Array | None = None) -> Array:
        """Input of one or more samples → [groups, rows, K] float32.

        ``x``: [N, C, …] for a convolution, [..., K] for a dense layer. ``rows`` picks output
        positions of each sample (indices into its flattened output pixels), all by default.
        """
        if self.node.op_type in ("Gemm", "MatMul"):
            flat = x.reshape(-1, x.shape[-1])
            return flat[None] if rows is None else flat[None, rows]
        windows = _windows(self.node, self.weight_shape[2:], x)
        spatial = len(self.weight_shape) - 2
        count, channels, *out = windows.shape[: 2 + spatial]
        taps = int(np.prod(self.weight_shape[2:]))
        index = np.arange(int(np.prod(out))) if rows is None else rows
        places: tuple[Any, ...] = np.unravel_index(index, tuple(out))
        picked = windows[(slice(None), slice(None), *places)]
        split = picked.reshape(count, self.groups, channels // self.groups, len(index), taps)
        return np.ascontiguousarray(split.transpose(1, 0, 3, 2, 4)).reshape(
            self.groups, count * len(index), -1
        )

    def rows(self, y: Array, rows: Array | None = None) -> Array:
        """Output of the samples → [groups, rows, outputs / groups], rows as ``patches`` orders."""
        if self.node.op_type in ("Gemm", "MatMul"):
            flat = y.reshape(-1, y.shape[-1])
            return flat[None] if rows is None else flat[None, rows]
        pixels: Array = y.reshape(y.shape[0], self.groups, self.outputs // self.groups, -1)
        if rows is not None:
            pixels = pixels[..., rows]
        return np.ascontiguousarray(pixels.transpose(1, 0, 3, 2)).reshape(
            self.groups, -1, self.outputs // self.groups
        )


def _windows(node: ir.Node, kernel: tuple[int, ...], x: Array) -> Array:
    """Sliding windows [N, C, out…, kernel…] of a padded input; a view where possible."""
    spatial = len(kernel)
    strides = tuple(node.attributes.get_ints("strides", (1,) * spatial))
    dilations = tuple(node.attributes.get_ints("dilations", (1,) * spatial))
    pads = conv_pads(node, kernel, x.shape[2:], strides, dilations)
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)])
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    axes = tuple(range(2, 2 + spatial))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axes)
    steps = [slice(None, None, s) for s in strides] + [slice(None, None, d) for d in dilations]
    return windows[(slice(None), slice(None), *steps)]


def conv_pads(
    node: ir.Node,
    kernel: tuple[int, ...],
    size: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> tuple[int, ...]:
    """Begin and end pads of the spatial axes, ``auto_pad`` resolved (ONNX Conv)."""
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return tuple(node.attributes.get_ints("pads", (0,) * (2 * len(kernel))))
    if mode == "VALID":
        return (0,) * (2 * len(kernel))
    begins, ends = [], []
    for n, k, s, d in zip(size, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small = total // 2
        begins.append(total - small if mode == "SAME_LOWER" else small)
        ends.append(small if mode == "SAME_LOWER" else total - small)
    return tuple(begins + ends)
