"""Channels that go together go together, and what is left computes what zeros would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import edgepipe
from edgepipe import passes, quantize
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.onnx_session import open_session
from edgepipe.prune import channels
from edgepipe.prune.channel_rules import couple
from edgepipe.recipe import Recipe
from edgepipe.target import Target


class Network:
    """Writes a graph of He weights over x[1, 3, 8, 8]."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.random = np.random.default_rng(0)

    def constant(self, *shape: int, scale: float = 1.0) -> str:
        array = (self.random.standard_normal(shape) * scale).astype(np.float32)
        return self.array(array)

    def array(self, array: np.ndarray) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def conv(self, x: str, co: int, ci: int, k: int = 1, group: int = 1) -> str:
        shape = (co, ci // group, k, k)
        weight = self.constant(*shape, scale=np.sqrt(2 / np.prod(shape[1:])))
        bias = self.constant(co, scale=0.1)
        y = self.add("Conv", x, weight, bias, pads=[k // 2] * 4, group=group)
        return self.add("Relu", y)

    def model(self, y: str, *shape: int) -> ir.Model:
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "g", [value("x", 1, [1, 3, 8, 8])], [value(y, 1, list(shape))], self.tensors
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        return ir.serde.deserialize_model(proto)


def residual(n: Network) -> ir.Model:
    """Residual Add, depthwise, grouped convolution, Concat, Resize, Flatten, dense layers."""
    a = n.conv("x", 16, 3, 3)
    b = n.conv(n.conv(a, 24, 16), 16, 24)
    c = n.add("Add", a, b)
    d = n.conv(n.conv(c, 16, 16, 3, group=16), 24, 16)
    e = n.conv(d, 16, 24, 3, group=2)
    f = n.add("Mul", n.add("Concat", d, e, axis=1), n.constant(1, 40, 1, 1))
    sizes = n.array(np.array([1, 40, 16, 16], np.int64))
    g = n.add("Resize", f, "", "", sizes, mode="nearest")
    h = n.add("AveragePool", g, kernel_shape=[8, 8], strides=[8, 8])
    i = n.add("Reshape", h, n.array(np.array([1, 160], np.int64)))
    j = n.add("Relu", n.add("Gemm", i, n.constant(32, 160, scale=0.1), n.constant(32), transB=1))
    return n.model(n.add("MatMul", j, n.constant(32, 10, scale=0.2)), 1, 10)


def outputs(model: ir.Model, samples: list[dict[str, np.ndarray]]) -> np.ndarray:
    session = open_session(quantize.onnx_bytes(model))
    return np.stack([session.run(None, s)[0] for s in samples])


@pytest.fixture(name="data")
def _data() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((1, 3, 8, 8), dtype=np.float32)} for _ in range(24)]


def context(recipe: str) -> Context:
    return Context(Target.load("x86-64-v3"), Recipe.parse(recipe))


def canonical(model: ir.Model) -> ir.Model:
    return passes.run(model, context("fp32"))


def test_fewer_channels_compute_what_zeros_would(data: list[dict[str, np.ndarray]]) -> None:
    model = canonical(residual(Network()))
    coupling = couple(model.graph)
    removal = channels.choose(model, coupling, 40.0, None)
    zeros = model.clone()
    again = couple(zeros.graph)  # the same classes, of the clone's nodes
    for cut in again.slices:
        if cut.index == 1 and cut.axis == channels.Layer.of(cut.node).input_axis:
            weight = cut.node.inputs[1].const_value.numpy()
            shape = [-1 if axis == cut.axis else 1 for axis in range(weight.ndim)]
            if cut.node not in [node for node, _ in again.depthwise]:
                channels.replace(cut.node, 1, weight * removal.stays(cut.ids).reshape(shape))
    wanted = outputs(zeros, data)
    channels.shrink(model.graph, removal)
    found = outputs(model, data)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    counts = sorted(removal.channels.values())
    assert (32, 20) in counts and counts.count((16, 8)) >= 2 and (10, 10) in counts
    # Positive control: the dense network computes something else.
    assert np.abs(outputs(canonical(residual(Network())), data) - wanted).max() > 1e-2


def test_channels_that_meet_go_together() -> None:
    model = canonical(residual(Network()))
    coupling = couple(model.graph)
    sizes = sorted(len(family) for family in coupling.families())
    # the residual sum 16, its inside 24, d 24 as two halves, e 16 as two halves, Gemm 32
    assert sizes == [8, 12, 16, 24, 32]


def test_unused_channels_go_first(data: list[dict[str, np.ndarray]]) -> None:
    """Filters whose output is a constant have no covariance: with data they cost nothing."""
    n = Network()
    a = n.conv("x", 16, 3, 3)
    model = n.model(n.conv(a, 8, 16), 1, 8, 8, 8)
    weight = model.graph.initializers["t0"]
    array = weight.const_value.numpy().copy()
    array[[1, 4, 9, 15]] = 0.0
    weight.const_value = ir.tensor(array, name="t0")
    bias = model.graph.initializers["t1"]
    bias.const_value = ir.tensor(np.abs(bias.const_value.numpy()) + 1, name="t1")
    dense = canonical(model)
    pruned = dense.clone()
    removal = channels.choose(pruned, couple(pruned.graph), 25.0, data)
    channels.refit(pruned, dense, removal, data)
    channels.shrink(pruned.graph, removal)
    assert removal.channels["v0"] == (16, 12)
    wanted = outputs(dense, data)
    assert np.abs(outputs(pruned, data) - wanted).max() < 2e-2 * np.abs(wanted).max()


def test_refitting_wins_over_magnitude(data: list[dict[str, np.ndarray]]) -> None:
    dense = canonical(residual(Network()))
    wanted, errors = outputs(dense, data), []
    for samples in (None, data):
        model = dense.clone()
        removal = channels.choose(model, couple(model.graph), 30.0, samples)
        if samples is not None:
            channels.refit(model, dense, removal, samples)
        channels.shrink(model.graph, removal)
        errors.append(float(np.square(outputs(model, data) - wanted).sum()))
    assert errors[1] < 0.5 * errors[0]


def test_what_an_operator_needs_whole_stays() -> None:
    n = Network()
    a = n.conv("x", 16, 3, 3)
    b = n.add("Softmax", a, axis=1)
    model = canonical(n.model(n.conv(b, 8, 16), 1, 8, 8, 8))
    coupling = couple(model.graph)
    assert coupling.families() == []
    node, ids = coupling.makers[0]
    assert "Softmax" in str(coupling.reason(int(coupling.roots(ids)[0]))), node


def test_a_network_without_channels_to_remove_is_refused(tmp_path: Path) -> None:
    n = Network()
    ir.save(n.model(n.conv("x", 16, 3, 3), 1, 16, 8, 8), tmp_path / "n.onnx")
    with pytest.raises(UserError, match="no channel of the network can be removed") as caught:
        edgepipe.compile(
            tmp_path / "n.onnx", target="host", recipe="fp32+c40%", output=tmp_path / "b"
        )
    assert "output of the model" in str(caught.value)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp32+c40%", "w8a8+c40%"])
def test_a_bundle_of_the_smaller_network_is_right(
    recipe: str, data: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    ir.save(residual(Network()), tmp_path / "n.onnx")
    arrays = {"x": np.concatenate([s["x"] for s in data])}
    bundle = edgepipe.compile(
        tmp_path / "n.onnx", target="host", recipe=recipe, calibration=arrays,
        output=tmp_path / "b",
    )  # fmt: skip
    assert not bundle.validate().failures
    facts = bundle.manifest["sparsity"]
    assert facts["refitted"] and facts["macs"]["left"] < 0.6 * facts["macs"]["dense"]
    assert facts["channels"]["v0"] == [16, 8]
    assert [o["shape"] for o in bundle.manifest["outputs"]] == [[1, 10]]
