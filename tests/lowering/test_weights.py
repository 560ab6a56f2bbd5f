"""Constant weights behind DequantizeLinear or Cast: what kernels read, and that it is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe import codegen, lowering
from edgepipe.codegen.plan import Plan
from edgepipe.context import Context
from edgepipe.kernels.weights import WeightFormat
from edgepipe.metrics import snr_db
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.onnx_conformance.batch import Batch
from tests.onnx_conformance.cases import Case

#: Float32 sums of a few hundred products in another order.
FLOOR_DB = 110.0

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Layer:
    """A linear operator and the axes of its weight: output channels, input channels."""

    op: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    channel: int
    inputs: int
    attributes: dict[str, Any] = field(default_factory=dict)


LAYERS = {
    "conv": Layer("Conv", (1, 20, 6, 7), (24, 20, 3, 3), 0, 1, {"pads": [1, 1, 1, 1]}),
    "conv1d": Layer("Conv", (1, 20, 9), (11, 20, 3), 0, 1),
    "depthwise": Layer("Conv", (1, 19, 7, 7), (19, 1, 3, 3), 0, 1, {"group": 19}),
    "transposed": Layer("ConvTranspose", (1, 20, 4, 5), (20, 9, 2, 2), 1, 0, {"strides": [2, 2]}),
    "gemm": Layer("Gemm", (3, 20), (33, 20), 0, 1, {"transB": 1}),
    "gemm_plain": Layer("Gemm", (1, 20), (20, 33), 1, 0),
    "matmul": Layer("MatMul", (2, 3, 20), (20, 10), 1, 0),
}

#: What a form makes of a weight: initializers, the node that computes "w", and its float64 value.
Form = Callable[[Layer, Array], tuple[dict[str, Any], onnx.NodeProto, Array]]


def _quantized(bits: int, block: int = 0, zero: int | None = None, axis: str = "channel") -> Form:
    def form(layer: Layer, w: Array) -> tuple[dict[str, Any], onnx.NodeProto, Array]:
        numbers = np.random.default_rng(1)
        along = layer.inputs if block or axis == "inputs" else layer.channel
        half = 1 << bits - 1
        shape = list(w.shape) if block else [w.shape[along]]
        if block:
            shape[along] = -(-w.shape[along] // block)
        scale = numbers.uniform(0.01, 0.03, () if axis == "tensor" else shape).astype(np.float32)
        stored = numbers.integers(0, 2 * half, w.shape) - (half if zero is None else 0)
        spread = scale
        if block:
            spread = np.repeat(scale, block, along).take(range(w.shape[along]), along)
        elif scale.ndim:
            spread = scale.reshape([-1 if a == along else 1 for a in range(w.ndim)])
        kind = {(4, True): "INT4", (8, True): "INT8", (4, False): "UINT4", (8, False): "UINT8"}[
            bits, zero is None
        ]
        constants = {"codes": (kind, stored), "scale": scale}
        if zero is not None:
            constants["zero"] = (kind, np.full(scale.shape, zero))
        attributes = {"axis": along} | ({"block_size": block} if block else {})
        node = helper.make_node(
            "DequantizeLinear", list(constants), ["w"], "dequantize", **attributes
        )
        return constants, node, (stored - (zero or 0)) * spread.astype(np.float64)

    return form


def _half(layer: Layer, w: Array) -> tuple[dict[str, Any], onnx.NodeProto, Array]:
    half = w.astype(np.float16)
    node = helper.make_node("Cast", ["half"], ["w"], "cast", to=TensorProto.FLOAT)
    return {"half": half}, node, half.astype(np.float64)


def _infinite(layer: Layer, w: Array) -> tuple[dict[str, Any], onnx.NodeProto, Array]:
    constants, node, value = _half(layer, w)
    constants["half"].reshape(-1)[0] = value.reshape(-1)[0] = np.inf
    return constants, node, value


FORMS: dict[str, tuple[Form, WeightFormat | str]] = {
    "int8": (_quantized(8), WeightFormat("int8")),
    "int8 of one scale": (_quantized(8, axis="tensor"), WeightFormat("int8")),
    "uint8": (_quantized(8, zero=128), WeightFormat("int8")),
    "int4": (_quantized(4), WeightFormat("int4")),
    "uint4": (_quantized(4, zero=8), WeightFormat("int4")),
    "int4 in blocks": (_quantized(4, block=5), WeightFormat("int4", 5)),
    "int8 in blocks, the last one short": (_quantized(8, block=8), WeightFormat("int8", 8)),
    "half": (_half, WeightFormat("float16")),
    "infinite half": (_infinite, "not all halves are finite"),
    "per input channel": (_quantized(8, axis="inputs"), "not along output channels"),
    "far zero point": (_quantized(8, zero=40), "do not fit 8 bits"),
}


def _tensor(name: str, value: Any) -> onnx.TensorProto:
    if isinstance(value, tuple):
        kind, array = value
        return helper.make_tensor(name, getattr(TensorProto, kind), array.shape, array.reshape(-1))
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


def model(layer: Layer, constants: dict[str, Any], nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """``layer`` on weight "w", which ``nodes`` compute or ``constants`` hold."""
    nodes = [*nodes, helper.make_node(layer.op, ["x", "w"], ["y"], "layer", **layer.attributes)]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, layer.x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [_tensor(name, value) for name, value in constants.items()],
    )
    built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    return onnx.shape_inference.infer_shapes(built, strict_mode=True, data_prop=True)


@pytest.fixture
def context() -> Context:
    return Context(Target.load("host"), Recipe())


def planned(batch: Batch, name: str, proto: onnx.ModelProto, context: Context) -> Plan:
    program = lowering.lower(ir.from_proto(proto), context)
    prefix = f"m{len(batch.objects)}"
    batch.plans[name], objects = codegen.generate(program, context, prefix)
    batch.objects.append(objects[""])
    return batch.plans[name]


def _cases() -> list[tuple[str, str]]:
    every = [(layer, form) for layer in LAYERS for form in ("int8", "half", "int4 in blocks")]
    every += [("conv", form) for form in FORMS if ("conv", form) not in every]
    return [*every, ("gemm", "int8 in blocks, the last one short"), ("matmul", "uint4")]


@dataclass(frozen=True)
class Compiled:
    """All cases in one library: by case, the notes and the output of both plans."""

    batch: Batch
    notes: dict[tuple[str, str], list[str]]
    models: dict[str, onnx.ModelProto]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """Every case, and beside it the same layer on the float32 weights that the case stands for."""
    batch, notes, models = Batch(), {}, {}
    for name, form in _cases():
        layer = LAYERS[name]
        w = np.random.default_rng(0).standard_normal(layer.weight).astype(np.float32) / 5
        constants, node, value = FORMS[form][0](layer, w)
        context = Context(Target.load("host"), Recipe())
        models[f"{name}/{form}"] = model(layer, constants, [node])
        models[f"{name}/{form}/float"] = model(layer, {"w": value.astype(np.float32)}, [])
        planned(batch, f"{name}/{form}", models[f"{name}/{form}"], context)
        notes[name, form] = [note.text for note in context.notes]
        planned(batch, f"{name}/{form}/float", models[f"{name}/{form}/float"], context)
    batch.link()
    return Compiled(batch, notes, models)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), _cases())
def test_kernel_reads_what_the_graph_stores(name: str, form: str, compiled: Compiled) -> None:
    layer, expected = LAYERS[name], FORMS[form][1]
    if name == "depthwise" and "blocks" in form:
        expected = "blocks of one input channel"
    x = np.random.default_rng(2).standard_normal(layer.x).astype(np.float32)
    batch, case = compiled.batch, f"{name}/{form}"
    got, reference = (
        batch.run(Case(which, compiled.models[which], {"x": x}, [], 0.0, 0.0))[0]
        for which in (case, f"{case}/float")
    )
    plan, plain = batch.plans[case], batch.plans[f"{case}/float"]
    (kernel,) = [entry for entry in plan.audit if entry.macs]
    if isinstance(expected, str):
        assert kernel.arithmetic == "float32"
        assert any(expected in note for note in compiled.notes[name, form])
    else:
        assert kernel.arithmetic == f"float32, weights {expected}"
        assert not compiled.notes[name, form]
        assert len(plan.weights) < 0.8 * len(plain.weights)
    if form == "infinite half":
        assert np.isinf(got).any()
        np.testing.assert_array_equal(got, reference)
        return
    assert snr_db(reference, got) > FLOOR_DB
    assert snr_db(reference, np.roll(got, 1)) < FLOOR_DB  # positive control


def test_a_weight_that_two_layers_share_is_stored_once(context: Context) -> None:
    layer = LAYERS["conv"]
    constants, node, _ = FORMS["int8"][0](layer, np.zeros(layer.weight, np.float32))
    proto = model(layer, constants, [node])
    alone = planned(Batch(), "a", proto, context)
    second = helper.make_node("Conv", ["x", "w"], ["z"], "second", **layer.attributes)
    proto.graph.node.append(second)
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 24, 6, 7)))
    plan = planned(Batch(), "m", proto, context)
    assert len(plan.weights) <= len(alone.weights)


def test_a_dequantised_constant_that_others_read_stays_computed(context: Context) -> None:
    layer = LAYERS["gemm"]
    constants, node, _ = FORMS["int8"][0](layer, np.zeros(layer.weight, np.float32))
    proto = model(layer, constants, [node])
    proto.graph.node.append(helper.make_node("Relu", ["w"], ["z"], "reader"))
    proto.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, layer.weight))
    plan = planned(Batch(), "m", proto, context)
    assert [e.arithmetic for e in plan.audit if e.macs] == ["float32, weights int8 per channel"]
    assert len(plan.calls) == 2
