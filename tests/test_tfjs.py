"""The calls of TensorFlow.js that an ONNX graph becomes, against ONNX Runtime: NumPy stands for the
package."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edgepipe.errors import UserError
from edgepipe.peers._tfjs_graph import graph_file

Array = np.ndarray[Any, Any]
RANDOM = np.random.default_rng(5)


def weights(*shape: int) -> Array:
    return (RANDOM.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def model(nodes: list[Any], shape: tuple[int, ...], **constants: Array) -> bytes:
    """From "x" to "y"."""
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()


def read(file: bytes) -> tuple[dict[str, Any], dict[str, Array]]:
    length = int.from_bytes(file[:4], "little")
    graph = json.loads(file[4 : 4 + length])
    numbers = np.frombuffer(file[4 + length :], np.float32)
    constants = {}
    for name, held in graph["constants"].items():
        start = held["offset"] // 4
        size = int(np.prod(held["shape"]))
        constants[name] = numbers[start : start + size].reshape(held["shape"])
    return graph, constants


def convolved(x: Array, step: dict[str, Any], kernel: Array, bias: Any = 0) -> Array:
    """Channels last in float64; ``depthwise`` kernels are [h, w, channels, multiplier]."""
    pads = [[0, 0]] * 4 if step["pad"] == "valid" else step["pad"]
    x, (sy, sx), (dy, dx) = np.pad(x, pads), step["strides"], step["dilations"]
    height = (x.shape[1] - (kernel.shape[0] - 1) * dy - 1) // sy + 1
    width = (x.shape[2] - (kernel.shape[1] - 1) * dx - 1) // sx + 1
    total = 0.0
    for i, j in np.ndindex(*kernel.shape[:2]):
        part = x[:, i * dy :, j * dx :][:, ::sy, ::sx][:, :height, :width].astype(np.float64)
        if step["op"] == "conv":
            total = total + part @ kernel[i, j]
        else:
            total = total + (part[..., None] * kernel[i, j]).reshape(*part.shape[:3], -1)
    return activated(total + bias, step)


def activated(x: Array, step: dict[str, Any]) -> Array:
    kind = step["activation"]
    return x if kind == "linear" else np.asarray(CALLS[kind](step, x))


CALLS: dict[str, Any] = {
    "conv": lambda s, *a: convolved(a[0], s, *a[1:]),
    "depthwise": lambda s, *a: convolved(a[0], s, *a[1:]),
    "dense": lambda s, x, b, bias=0: activated((x @ b + bias).reshape(s["shape"]), s),
    "matMul": lambda s, a, b: a @ b,
    "relu": lambda s, x: np.maximum(x, 0),
    "sigmoid": lambda s, x: 1 / (1 + np.exp(-x)),
    "relu6": lambda s, x: np.clip(x, 0, 6),
    "clip": lambda s, x: np.clip(x, s["low"], s["high"]),
    "add": lambda s, a, b: a + b,
    "mul": lambda s, a, b: a * b,
    "mean": lambda s, x: x.mean(tuple(s["axes"]), keepdims=s["keep"]),
    "max": lambda s, x: x.max(tuple(s["axes"]), keepdims=s["keep"]),
    "reshape": lambda s, x: x.reshape(s["shape"]),
    "transpose": lambda s, x: x.transpose(s["axes"]),
    "concat": lambda s, *xs: np.concatenate(xs, s["axis"]),
    "slice": lambda s, x: x[tuple(map(slice, s["begin"], np.add(s["begin"], s["size"])))],
    "softmax": lambda s, x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
}


def computed(file: bytes, x: Array) -> tuple[Array, list[str]]:
    """What the calls give, channels first again, and which they were. Freed tensors are gone."""
    graph, held = read(file)
    held[graph["inputs"][0]] = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
    for step in graph["steps"]:
        given = [held[name] for name in step["inputs"]]
        held[step["output"]] = CALLS[step["op"]](step, *given)
        for name in step["free"]:
            del held[name]
    (name,) = graph["outputs"]
    assert set(held) == {name, "x", *graph["constants"]}
    y = held[name]
    return y.transpose(0, 3, 1, 2) if y.ndim == 4 else y, [s["op"] for s in graph["steps"]]


def check(proto: bytes, shape: tuple[int, ...]) -> list[str]:
    x = RANDOM.standard_normal(shape).astype(np.float32)
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": x})
    found, calls = computed(graph_file(proto), x)
    assert found.shape == expected.shape
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(found, np.roll(expected, 1), rtol=1e-2, atol=1e-2)
    return calls


def test_a_residual_network_is_fused_and_turned_nowhere() -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "a"], ["t"], strides=[2, 2], pads=[1, 0, 1, 2]),
        node("BatchNormalization", ["t", "s", "b", "m", "v"], ["n"]),
        node("Clip", ["n", "zero", "six"], ["c"]),
        node("Conv", ["c", "d", "e"], ["u"], group=6, pads=[1, 1, 1, 1]),
        node("Relu", ["u"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Conv", ["p", "f"], ["g"]),
        node("Sigmoid", ["g"], ["gate"]),
        node("Mul", ["r", "gate"], ["scaled"]),
        node("Add", ["scaled", "c"], ["sum"]),
        node("Mul", ["sum", "per"], ["weighed"]),
        node("Concat", ["weighed", "c"], ["y"], axis=1),
    ]
    proto = model(
        nodes, (1, 3, 9, 8), a=weights(6, 3, 3, 3), d=weights(6, 1, 3, 3), e=weights(6),
        f=weights(6, 6, 1, 1), s=weights(6), b=weights(6), m=weights(6), v=weights(6) ** 2,
        zero=np.float32(0).reshape(()), six=np.float32(6).reshape(()), per=weights(6, 1, 1),
    )  # fmt: skip
    calls = check(proto, (1, 3, 9, 8))
    assert calls == ["conv", "depthwise", "mean", "conv", "mul", "add", "mul", "concat"]


def test_products_after_a_flatten_and_over_tokens() -> None:
    node = helper.make_node
    nodes = [
        node("Conv", ["x", "a"], ["t"]), node("Flatten", ["t"], ["f"]),
        node("Gemm", ["f", "g", "h"], ["r"], transB=1), node("Relu", ["r"], ["y"]),
    ]  # fmt: skip
    proto = model(nodes, (1, 3, 4, 5), a=weights(4, 3, 2, 2), g=weights(7, 48), h=weights(7))
    assert check(proto, (1, 3, 4, 5)) == ["conv", "transpose", "reshape", "dense"]
    nodes = [
        node("MatMul", ["x", "a"], ["t"]), node("Add", ["t", "b"], ["u"]),
        node("Transpose", ["u"], ["k"], perm=[0, 2, 1]), node("MatMul", ["u", "k"], ["s"]),
        node("Softmax", ["s"], ["y"], axis=-1),
    ]  # fmt: skip
    proto = model(nodes, (1, 5, 6), a=weights(6, 8), b=weights(8))
    calls = check(proto, (1, 5, 6))
    assert calls == ["reshape", "dense", "reshape", "transpose", "matMul", "softmax"]


def test_parts_are_cut_where_the_channels_are() -> None:
    node, numbers = helper.make_node, np.array
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Split", ["r", "sizes"], ["s", "t"], axis=1),
        node("Slice", ["t", "from", "to", "width"], ["u"]),
        node("Slice", ["s", "from", "to", "width"], ["v"]),
        node("Concat", ["v", "u"], ["c"], axis=1),
        node("Gather", ["c", "second"], ["y"], axis=2),
    ]
    proto = model(nodes, (1, 5, 4, 6), sizes=numbers([2, 3]), width=numbers([3]),
                  second=numbers(-2), **{"from": numbers([-5]), "to": numbers([5])})  # fmt: skip
    calls = check(proto, (1, 5, 4, 6))
    assert calls == ["relu", *["slice"] * 4, "concat", "slice", "transpose", "reshape"]


@pytest.mark.parametrize(
    ("node", "constants", "message"),
    [
        (helper.make_node("Hardmax", ["x"], ["y"], name="h"), {}, "Hardmax 'h' has no counterpart"),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2), {"w": weights(4, 2, 1, 1)},
         "Conv with 2 groups"),
        (helper.make_node("Softmax", ["x"], ["y"], axis=2), {}, "Softmax over axis 2"),
        (helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], ceil_mode=1), {},
         "MaxPool with indices or ceil_mode"),
    ],
)  # fmt: skip
def test_operators_without_a_counterpart_are_named(
    node: Any, constants: dict[str, Array], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        graph_file(model([node], (1, 4, 5, 5), **constants))
