"""Random image networks as ONNX: every template and its neighbours in odd combinations."""

from __future__ import annotations

import random

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ACTIVATIONS = ["Relu", "Sigmoid", "HardSwish", "LeakyRelu", "Tanh", "Clip", "Elu", "Gelu"]


class Network:
    """Builds one graph; ``values`` are the NCHW tensors made so far with their shapes."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        shape = (self.rng.choice([1, 1, 2]), self.rng.choice([1, 3, 8, 17]),
                 self.rng.randint(5, 17), self.rng.randint(5, 19))  # fmt: skip
        self.input = ("x", shape)
        self.values: list[tuple[str, tuple[int, ...]]] = [self.input]

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(
        self, kind: str, inputs: list[str], shape: tuple[int, ...], **attributes: object
    ) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"n_{name}", **attributes))
        self.values.append((name, shape))
        return name

    def pick(self) -> tuple[str, tuple[int, ...]]:
        recent = [v for v in self.values if len(v[1]) == 4][-5:]
        return self.rng.choice(recent)

    def grow(self, steps: int) -> None:
        makers = [self.conv, self.conv, self.conv, self.depthwise, self.transposed, self.pool,
                  self.activation, self.activation, self.residual, self.gate, self.norm,
                  self.concat, self.resize, self.pad, self.shuffle, self.scale]  # fmt: skip
        while len(self.nodes) < steps:
            self.rng.choice(makers)()

    def conv(self) -> None:
        x, (n, c, h, w) = self.pick()
        kh, kw = (self.rng.choice([1, 1, 3, 5]) for _ in range(2))
        if self.rng.random() < 0.4:
            kh = kw = 1
        if min(h, w) < 1 or h * w > 1500:
            return
        strides = [self.rng.choice([1, 1, 2]) for _ in range(2)]
        dilations = [self.rng.choice([1, 1, 2]) for _ in range(2)]
        reach = [(k - 1) * d for k, d in zip((kh, kw), dilations, strict=True)]
        pads = [self.rng.randint(0, r) for r in reach + reach]
        sizes = [(s + pads[i] + pads[i + 2] - reach[i] - 1) // strides[i] + 1
                 for i, s in enumerate((h, w))]  # fmt: skip
        if min(sizes) < 1:
            return
        groups = self.rng.choice([1, 1, 1, 2]) if c % 2 == 0 else 1
        co = groups * self.rng.choice([1, 4, 8, 11, 16])
        weight = self.numbers.standard_normal((co, c // groups, kh, kw))
        weight *= np.sqrt(2 / (c // groups * kh * kw))
        inputs = [x, self.constant(weight.astype(np.float32))]
        if self.rng.random() < 0.7:
            inputs.append(self.constant(self.numbers.standard_normal(co).astype(np.float32)))
        self.node("Conv", inputs, (n, co, *sizes), strides=strides, dilations=dilations,
                  pads=pads, group=groups)  # fmt: skip

    def depthwise(self) -> None:
        x, (n, c, h, w) = self.pick()
        k, stride = self.rng.choice([3, 5]), self.rng.choice([1, 2])
        if h * w > 1500:
            return
        weight = self.numbers.standard_normal((c, 1, k, k)).astype(np.float32) / k
        sizes = [(s - 1) // stride + 1 for s in (h, w)]
        self.node("Conv", [x, self.constant(weight)], (n, c, *sizes), strides=[stride] * 2,
                  pads=[k // 2] * 4, group=c)  # fmt: skip

    def transposed(self) -> None:
        x, (n, c, h, w) = self.pick()
        if h * w > 300:
            return
        k, stride = self.rng.choice([2, 3, 4]), self.rng.choice([1, 2, 3])
        extra = self.rng.randrange(0, stride)
        co = self.rng.choice([3, 8])
        weight = self.numbers.standard_normal((c, co, k, k)).astype(np.float32) / np.sqrt(c * k)
        sizes = [(s - 1) * stride + k - 1 + extra - 1 for s in (h, w)]
        if min(sizes) < 1 or extra >= max(stride, 1):
            return
        self.node("ConvTranspose", [x, self.constant(weight.astype(np.float32))],
                  (n, co, *sizes), strides=[stride] * 2, pads=[1, 1, 1, 1],
                  output_padding=[extra] * 2)  # fmt: skip

    def pool(self) -> None:
        x, (n, c, h, w) = self.pick()
        if self.rng.random() < 0.3:
            self.node(self.rng.choice(["GlobalAveragePool", "GlobalMaxPool"]), [x], (n, c, 1, 1))
            return
        k, stride = self.rng.choice([2, 3]), self.rng.choice([1, 2])
        p = self.rng.choice([0, 1]) if k == 3 else 0
        sizes = [(s + 2 * p - k) // stride + 1 for s in (h, w)]
        if min(sizes) < 1:
            return
        kind = self.rng.choice(["MaxPool", "AveragePool"])
        extra = {"count_include_pad": self.rng.choice([0, 1])} if kind == "AveragePool" else {}
        self.node(kind, [x], (n, c, *sizes), kernel_shape=[k, k], strides=[stride] * 2,
                  pads=[p] * 4, **extra)  # fmt: skip

    def activation(self) -> None:
        x, shape = self.pick()
        kind = self.rng.choice(ACTIVATIONS)
        inputs = [x]
        if kind == "Clip":
            inputs += [self.constant(np.float32(0)), self.constant(np.float32(6))]
        name = self.node(kind, inputs, shape)
        if kind == "Sigmoid" and self.rng.random() < 0.5:
            self.node("Mul", [x, name], shape)

    def residual(self) -> None:
        a, shape = self.pick()
        same = [v for v, s in self.values if s == shape and v != a]
        other = self.rng.choice(same) if same else a
        self.node(self.rng.choice(["Add", "Add", "Sub", "Max", "Mul"]), [a, other], shape)

    def gate(self) -> None:
        x, shape = self.pick()
        c = shape[1]
        pooled = self.node("ReduceMean", [x, self.constant(np.array([2, 3]))], (shape[0], c, 1, 1))
        weight = self.numbers.standard_normal((c, c, 1, 1)).astype(np.float32) / np.sqrt(c)
        squeezed = self.node("Conv", [pooled, self.constant(weight.astype(np.float32))],
                             (shape[0], c, 1, 1))  # fmt: skip
        gate = self.node("Sigmoid", [squeezed], (shape[0], c, 1, 1))
        self.node("Mul", [x, gate] if self.rng.random() < 0.5 else [gate, x], shape)

    def norm(self) -> None:
        x, shape = self.pick()
        c = shape[1]
        mean, bias = (self.numbers.standard_normal(c).astype(np.float32) for _ in range(2))
        scale, variance = (self.numbers.uniform(0.5, 2, c).astype(np.float32) for _ in range(2))
        names = [self.constant(a) for a in (scale, bias, mean, variance)]
        self.node("BatchNormalization", [x, *names], shape)

    def concat(self) -> None:
        a, shape = self.pick()
        fitting = [(v, s) for v, s in self.values if len(s) == 4 and (s[0], *s[2:]) == (
            shape[0], *shape[2:])]  # fmt: skip
        b, other = self.rng.choice(fitting)
        if shape[1] + other[1] < 64:
            self.node("Concat", [a, b], (shape[0], shape[1] + other[1], *shape[2:]), axis=1)

    def resize(self) -> None:
        x, (n, c, h, w) = self.pick()
        if h * w > 300:
            return
        scales = self.constant(np.array([1, 1, 2, 2], np.float32))
        if self.rng.random() < 0.5:
            options = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
                       "nearest_mode": "floor"}  # fmt: skip
        else:
            mode = self.rng.choice(["half_pixel", "align_corners", "asymmetric"])
            options = {"mode": "linear", "coordinate_transformation_mode": mode}
        self.node("Resize", [x, "", scales], (n, c, 2 * h, 2 * w), **options)

    def pad(self) -> None:
        x, (n, c, h, w) = self.pick()
        pads = self.constant(np.array([0, 0, 1, 0, 0, 0, 0, 2]))
        self.node("Pad", [x, pads], (n, c, h + 1, w + 2))

    def shuffle(self) -> None:
        x, (n, c, h, w) = self.pick()
        if self.rng.random() < 0.5:
            self.node("Transpose", [x], (n, c, w, h), perm=[0, 1, 3, 2])
        elif h > 3:
            bounds = [self.constant(np.array([v])) for v in (1, h, 2, 1)]
            self.node("Slice", [x, *bounds], (n, c, h - 1, w))

    def scale(self) -> None:
        x, shape = self.pick()
        array = self.numbers.standard_normal(self.rng.choice([(), (1, shape[1], 1, 1)]))
        operand = self.constant(np.asarray(array, np.float32))
        self.node(self.rng.choice(["Mul", "Add"]), [x, operand], shape)

    def model(self) -> onnx.ModelProto:
        """All values that nobody reads are outputs, and one that somebody reads; a dense head."""
        x, shape = self.pick()
        features = int(np.prod(shape[1:]))
        flat = self.node("Flatten", [x], (shape[0], features))
        weight = self.numbers.standard_normal((10, features)) / np.sqrt(features)
        dense = self.node("Gemm", [flat, self.constant(weight.astype(np.float32)),
                                   self.constant(np.zeros(10, np.float32))], (shape[0], 10),
                          transB=1)  # fmt: skip
        self.node("Softmax", [dense], (shape[0], 10))
        read = {name for node in self.nodes for name in node.input}
        outputs = [v for v in self.values if v[0] not in read]
        middle = self.rng.choice(self.values[1:])
        outputs += [middle] if middle not in outputs else []
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.input[1])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        return model


def random_network(seed: int, steps: int = 14) -> onnx.ModelProto:
    """A random network of about ``steps`` nodes; the same seed gives the same network."""
    network = Network(seed)
    network.grow(steps)
    return network.model()
