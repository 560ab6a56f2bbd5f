"""Random Q/DQ layers, many to a graph: every operator that integer kernels compute."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepipe import bilinear

Array = np.ndarray[Any, np.dtype[Any]]


class Graph:
    """Builds one model; every layer has inputs and an output of its own."""

    def __init__(self, seed: int) -> None:
        self.random, self.numbers = random.Random(seed), np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.feeds: dict[str, Array] = {}
        self.scales: dict[str, np.float32] = {}
        self.zeros: dict[str, int] = {}
        self.count = 0

    def fresh(self, hint: str) -> str:
        self.count += 1
        return f"{hint}{self.count}"

    def const(self, array: Array, dtype: int | None = None) -> str:
        name = self.fresh("c")
        if dtype is None:
            self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        else:
            self.tensors.append(helper.make_tensor(name, dtype, array.shape, array.ravel()))
        return name

    def op(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = self.fresh(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [name], f"n_{name}", **attributes))
        return name

    def input(self, *shape: int) -> str:
        name = self.fresh("x")
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        self.feeds[name] = self.numbers.standard_normal(shape).astype(np.float32) * 2
        return name

    def grid(self, low: float, high: float) -> tuple[np.float32, int]:
        """Scale and zero point (uint8) for a range; now and then one at the end of the codes."""
        zero = self.random.choice([0, 255, 128, self.random.randrange(256)])
        return np.float32((high - low) / 255), zero

    def rounded(self, x: str, scale: np.float32, zero: int) -> str:
        """Q and DQ behind ``x``."""
        parameters = [self.const(np.asarray(scale)), self.const(np.asarray(zero, np.uint8))]
        codes = self.op("QuantizeLinear", [x, *parameters])
        result = self.op("DequantizeLinear", [codes, *parameters])
        self.scales[result], self.zeros[result] = scale, zero
        return result

    def codes(self, *shape: int) -> str:
        """A dequantised input."""
        return self.rounded(self.input(*shape), *self.grid(-4, 4))

    def weights(
        self, shape: Sequence[int], axis: int, limit: int, blocks: float = 1.0
    ) -> tuple[str, Array]:
        """Dequantised int8 (int4 below 8) weights with a scale per channel of ``axis``; of a
        convolution's blocks of four input channels a share ``blocks`` is not zero."""
        low, high = (-8, 7) if limit < 8 else (-limit, limit)
        codes = self.numbers.integers(low, high + 1, shape).astype(np.int8)
        if blocks < 1.0:
            kept = self.numbers.random((shape[0], -(-shape[1] // 4), *shape[2:])) < blocks
            codes *= kept.repeat(4, 1)[:, : shape[1]]
        scale = self.numbers.uniform(0.5, 2, shape[axis]).astype(np.float32) / (
            high * math.sqrt(np.prod(shape) / shape[axis])
        )
        kind = TensorProto.INT4 if limit < 8 else TensorProto.INT8
        inputs = [self.const(codes, kind), self.const(scale)]
        return self.op("DequantizeLinear", inputs, axis=axis), scale

    def bias(self, scale: Array) -> str:
        """A dequantised int32 bias whose scale is ``scale``."""
        codes = self.numbers.integers(-3000, 3000, len(scale)).astype(np.int32)
        return self.op("DequantizeLinear", [self.const(codes), self.const(scale)], axis=0)

    def activated(self, x: str) -> str:
        kind = self.random.choice(["", "Relu", "Clip"])
        if kind == "Clip":
            ends = [self.const(np.asarray(v, np.float32)) for v in (-0.25, 1.5)]
            return self.op("Clip", [x, *ends])
        return self.op(kind, [x]) if kind else x

    def finish(self, x: str, rounds: bool | None = None) -> None:
        """Round the layer's result (or not), and make it an output."""
        if rounds if rounds is not None else self.random.random() < 0.8:
            spread = self.random.choice([1e-3, 1.0, 4.0, 4.0, 4.0, 1e4])
            x = self.rounded(x, *self.grid(-spread, spread))
        self.outputs.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, None))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


LIMITS = (7, 63, 63, 127)


def conv(g: Graph, kind: str) -> None:
    r = g.random
    kernel = [1, 1] if kind == "pointwise" else [r.choice([1, 2, 3, 5]), r.choice([1, 3, 5])]
    strides = [r.choice([1, 1, 2]), r.choice([1, 2])]
    dilations = [1, 1] if kind == "pointwise" else [r.choice([1, 1, 2]), r.choice([1, 1, 2])]
    pads = [r.randrange(k) for k in kernel * 2]
    groups, c, co = 1, r.choice([1, 3, 8, 10, 24, 33]), r.choice([1, 4, 7, 16, 24, 41])
    if kind == "grouped":
        groups = r.choice([2, 3])
        c, co = groups * r.choice([4, 8, 5]), groups * r.choice([8, 16, 3])
    if kind == "depthwise":
        groups = c = co = r.choice([3, 8, 16, 20])
    h, w = (
        (r.randrange(1, 8) - 1) * s + (k - 1) * d + 1 + r.randrange(s)
        for s, k, d in zip(strides, kernel, dilations, strict=True)
    )
    x = g.codes(r.choice([1, 1, 2]), c, h, w)
    weight, scale = g.weights([co, c // groups, *kernel], 0, r.choice(LIMITS))
    inputs = [x, weight]
    if r.random() < 0.8:
        inputs.append(g.bias(scale * g.scales[x]))
    attributes = {"strides": strides, "dilations": dilations, "pads": pads, "group": groups}
    y = g.op("Conv", inputs, kernel_shape=kernel, **attributes)
    if r.random() < 0.4:
        shape = _conv_shape(g, x, co, kernel, strides, dilations, pads)
        y = g.op("Add", [y, g.codes(*shape)])
    g.finish(g.activated(y))


def blocks(g: Graph) -> None:
    """A convolution most of whose blocks of weights are zero."""
    r = g.random
    c, co = r.choice([20, 24, 64]), r.choice([16, 24, 40])
    k, stride, size = r.choice([1, 1, 3]), r.choice([1, 1, 2]), [r.choice([5, 9, 16]) for _ in "hw"]
    x = g.codes(r.choice([1, 2]), c, *size)
    weight, scale = g.weights([co, c, k, k], 0, r.choice(LIMITS), blocks=0.1)
    attributes = {"strides": [stride] * 2, "pads": [k // 2] * 4}
    y = g.op("Conv", [x, weight, g.bias(scale * g.scales[x])], kernel_shape=[k, k], **attributes)
    if r.random() < 0.5:
        shape = _conv_shape(g, x, co, (k, k), [stride] * 2, (1, 1), [k // 2] * 4)
        y = g.op("Add", [y, g.codes(*shape)])
    g.finish(g.activated(y))


def nine_taps(g: Graph, limit: int) -> None:
    """A 3x3 convolution with channels and tiles enough for Winograd's kernels."""
    r = g.random
    c, co, h, w = r.choice([16, 20, 40]), r.choice([16, 24, 40]), r.randint(8, 11), r.randint(8, 15)
    x, (weight, scale) = g.codes(r.choice([1, 2]), c, h, w), g.weights([co, c, 3, 3], 0, limit)
    y = g.op("Conv", [x, weight, g.bias(scale * g.scales[x])], pads=[1, 1, 1, 1])
    if r.random() < 0.5:
        y = g.op("Add", [y, g.codes(*_conv_shape(g, x, co, (3, 3), (1, 1), (1, 1), [1] * 4))])
    g.finish(g.activated(y))


def image(g: Graph) -> None:
    """A convolution whose neighbours share most of what they read, and fill vectors of channels."""
    r = g.random
    kernel, strides = [r.choice([1, 3]), r.choice([2, 3, 5, 7])], [1, r.choice([1, 2, 2, 3])]
    pads = [r.randrange(k) for k in kernel * 2]
    c, co = r.choice([3, 4]), r.choice([16, 24, 40])
    x = g.codes(1, c, kernel[0] + r.randrange(2), kernel[1] + r.randrange(30))
    weight, scale = g.weights([co, c, *kernel], 0, r.choice(LIMITS))
    y = g.op("Conv", [x, weight, g.bias(scale * g.scales[x])], pads=pads, strides=strides)
    g.finish(g.activated(y))


def three_rows(g: Graph) -> None:
    """Depthwise, three rows of taps, whole vectors of channels: what dot products do."""
    r = g.random
    c, kernel = r.choice([16, 40, 48]), (3, r.choice([1, 3, 3, 5]))
    pads = [r.randrange(k) for k in kernel * 2]
    x = g.codes(r.choice([1, 2]), c, r.randrange(4, 10), r.randrange(5, 10))
    weight, scale = g.weights([c, 1, *kernel], 0, r.choice(LIMITS))
    inputs = [x, weight, g.bias(scale * g.scales[x])]
    y = g.op("Conv", inputs, kernel_shape=kernel, pads=pads, group=c)
    if r.random() < 0.4:
        y = g.op("Add", [y, g.codes(*_conv_shape(g, x, c, kernel, (1, 1), (1, 1), pads))])
    g.finish(g.activated(y))


def _conv_shape(
    g: Graph, x: str, co: int, kernel: Any, strides: Any, dilations: Any, pads: Any
) -> list[int]:
    source = next(n for n in reversed(g.nodes) if n.output[0] == x).input[0]
    first = next(n for n in g.nodes if n.output[0] == source).input[0]
    n, _, *size = g.feeds[first].shape
    spatial = [
        (s + pads[a] + pads[a + 2] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1
        for a, s in enumerate(size)
    ]
    return [n, co, *spatial]


def conv1d(g: Graph) -> None:
    weight, scale = g.weights([8, 6, 3], 0, 63)
    x = g.codes(1, 6, 17)
    g.finish(g.op("Conv", [x, weight, g.bias(scale * g.scales[x])], pads=[1, 1], strides=[2]))


def transposed(g: Graph) -> None:
    r = g.random
    kernel, stride = [r.choice([1, 2, 3, 4]), r.choice([2, 3, 4])], r.choice([1, 2, 2, 3])
    pads = [r.randrange((k + 1) // 2) for k in kernel * 2]
    more = [r.randrange(stride) for _ in kernel]
    c, co = r.choice([6, 16]), r.choice([5, 8])
    weight, scale = g.weights([c, co, *kernel], 1, r.choice(LIMITS))
    x = g.codes(1, c, 4, 5)
    bias = g.bias(scale * g.scales[x])
    attributes = {"strides": [stride] * 2, "pads": pads, "output_padding": more}
    g.finish(g.activated(g.op("ConvTranspose", [x, weight, bias], **attributes)))


def shuffled(g: Graph) -> None:
    mode, c = g.random.choice(["DCR", "CRD"]), g.random.choice([1, 3, 8])
    x = g.codes(1, 4 * c, 3, 5)
    weight, _ = g.weights([6, c, 1, 1], 0, 63)
    y = g.op("DepthToSpace", [x], blocksize=2, mode=mode)
    y = g.rounded(y, g.scales[x], g.zeros[x])
    g.finish(g.op("Conv", [y, weight]))


def dense(g: Graph) -> None:
    r = g.random
    k, n, limit = r.choice([4, 20, 33, 64]), r.choice([2, 10, 16, 48]), r.choice(LIMITS)
    if r.random() < 0.5:
        trans = r.randrange(2)
        shape = [n, k] if trans else [k, n]
        weight, scale = g.weights(shape, 0 if trans else 1, limit)
        x = g.codes(r.choice([1, 3]), k)
        y = g.op("Gemm", [x, weight, g.bias(scale * g.scales[x])], transB=trans)
    else:
        weight, scale = g.weights([k, n], 1, limit)
        x = g.codes(2, r.choice([1, 7]), k)
        y = g.op("Add", [g.op("MatMul", [x, weight]), g.bias(scale * g.scales[x])])
    g.finish(g.activated(y))


def products(g: Graph) -> None:
    r = g.random
    m, k, n = r.choice([1, 5, 17]), r.choice([4, 12, 33, 50]), r.choice([3, 8, 13, 16, 36])
    batch = r.choice([(), (3,), (2, 3)])
    other = batch if r.random() < 0.7 else (1,) * len(batch)
    y = g.op("MatMul", [g.codes(*batch, m, k), g.codes(*other, k, n)])
    if r.random() < 0.5:
        y = g.op("Mul", [y, g.const(np.asarray(0.25, np.float32))])
    g.finish(g.activated(y))


def arithmetic(g: Graph) -> None:
    shape = [1, g.random.choice([3, 8, 24]), 5, 6]
    kind = g.random.choice(["Add", "Sub", "Mul", "gate"])
    other = [1, shape[1], 1, 1] if kind == "gate" else shape
    y = g.op("Mul" if kind == "gate" else kind, [g.codes(*shape), g.codes(*other)])
    g.finish(g.activated(y))


def pools(g: Graph) -> None:
    c, kind = g.random.choice([3, 8, 24]), g.random.choice(["max", "average", "global", "mean"])
    x = g.codes(1, c, 9, 7)
    if kind == "max":
        y = g.op("MaxPool", [x], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1])
    elif kind == "average":
        include = g.random.randrange(2)
        y = g.op("AveragePool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1],
                 count_include_pad=include)  # fmt: skip
    elif kind == "global":
        y = g.op("GlobalAveragePool", [x])
    else:
        y = g.op("ReduceMean", [x, g.const(np.array([1], np.int64))], keepdims=0)
    g.finish(y)


def tables(g: Graph) -> None:
    x = g.codes(1, g.random.choice([3, 8]), 4, 5)
    kind = g.random.choice(["Sigmoid", "HardSwish", "Tanh", "LeakyRelu", "silu"])
    if kind == "silu":
        gate = g.rounded(g.op("Sigmoid", [x]), np.float32(1 / 255), 0)
        g.finish(g.op("Mul", [x, gate]), rounds=True)
        return
    g.finish(g.op(kind, [x]), rounds=True)


def resized(g: Graph, addend: bool = False) -> None:
    """Bilinear between the codes of a convolution, or of an input in ONNX's own layout; with an
    ``addend`` that joins it before it is rounded."""
    c, co = g.random.choice([3, 8, 10]), g.random.choice([0, 8, 12])
    x, size = g.codes(1, c, 4, 5), g.random.choice([(8, 10), (7, 9)])
    if co:
        weight, scale = g.weights([co, c, 3, 3], 0, 63)
        x = g.op("Conv", [x, weight, g.bias(scale * g.scales[x])], pads=[1, 1, 1, 1])
        x = g.rounded(x, *g.grid(-4, 4))
    sizes = g.const(np.array([1, co or c, *size], np.int64))
    transform = g.random.choice(bilinear.TRANSFORMS)
    y = g.op("Resize", [x, "", "", sizes], mode="linear", coordinate_transformation_mode=transform)
    if addend:
        y = g.op("Add", [y, g.codes(1, co or c, *size)])
    if g.random.random() < 0.5:
        y = g.op("Relu", [y])
    g.finish(y)


def movement(g: Graph) -> None:
    """Codes moved between two convolutions, so that layouts have to follow."""
    c = g.random.choice([8, 10])
    x = g.codes(1, c, 6, 6)
    weight, scale = g.weights([c, c, 3, 3], 0, 63)
    y = g.op("Conv", [x, weight, g.bias(scale * g.scales[x])], pads=[1, 1, 1, 1])
    y = g.rounded(y, *g.grid(-4, 4))
    kind = g.random.choice(["Pad", "Resize", "Transpose", "Concat", "Slice", "DepthToSpace"])
    kept = g.scales[y]
    if kind == "Pad":
        y = g.op("Pad", [y, g.const(np.array([0, 0, 1, 0, 0, 0, 2, 1], np.int64))])
    elif kind == "Resize":
        y = g.op("Resize", [y, "", g.const(np.array([1, 1, 2, 2], np.float32))], mode="nearest",
                 coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    elif kind == "Transpose":
        y = g.op("Transpose", [y], perm=[0, 1, 3, 2])
    elif kind == "Concat":
        y = g.op("Concat", [y, g.op("MaxPool", [y], kernel_shape=[1, 1])], axis=1)
    elif kind == "Slice":
        ends = [g.const(np.array([v], np.int64)) for v in (1, 5, 2)]
        y = g.op("Slice", [y, *ends])
    else:
        weight, scale = g.weights([16, c, 1, 1], 0, 63)
        y = g.rounded(g.op("Conv", [y, weight]), *g.grid(-4, 4))
        kept = g.scales[y]
        y = g.op("DepthToSpace", [y], blocksize=2)
    zero = next(n for n in reversed(g.nodes) if n.op_type == "DequantizeLinear").input[2]
    parameters = [g.const(np.asarray(kept)), zero]
    codes = g.op("QuantizeLinear", [y, *parameters])
    g.outputs.append(
        helper.make_tensor_value_info(
            g.op("DequantizeLinear", [codes, *parameters]), TensorProto.FLOAT, None
        )
    )


LAYERS: list[Callable[[Graph], None]] = [
    lambda g: conv(g, "pointwise"), lambda g: conv(g, "regular"), lambda g: conv(g, "regular"),
    lambda g: conv(g, "depthwise"), lambda g: conv(g, "grouped"), conv1d, transposed, transposed,
    shuffled, dense, dense, products, arithmetic, arithmetic, pools, pools, tables, movement,
    movement, blocks, blocks, three_rows, resized,
    lambda g: resized(g, addend=True),
]  # fmt: skip


def build(seed: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model with one layer of every kind, and inputs for it."""
    g = Graph(seed)
    for layer in LAYERS:
        layer(g)
    return g.model(), g.feeds
