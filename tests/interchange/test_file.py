"""The file itself: read back with the schema module that LiteRT publishes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from quantization.networks import MIXED, build, run, samples

from edgepipe.interchange import tflite
from edgepipe.interchange.tflite import schema
from edgepipe.interchange.tflite.network import ALIGNMENT, Network
from interchange.litert import Program, output_scale, quantize

pytestmark = pytest.mark.needs_litert

#: Our name of an option → the schema's, where it is not just the other spelling.
SPELLING = {
    "activation": "FusedActivationFunction",
    "dilation_h": "DilationHFactor",
    "dilation_w": "DilationWFactor",
    "filter_h": "FilterHeight",
    "filter_w": "FilterWidth",
}


def published() -> Any:
    from ai_edge_litert import schema_py_generated

    return schema_py_generated


def parsed(data: bytes) -> Any:
    return published().Model.GetRootAs(data, 0)


@pytest.mark.parametrize("kind", schema.OPERATORS)
def test_codes_and_slots_are_those_of_the_schema(kind: str) -> None:
    operator = schema.OPERATORS[kind]
    values = {name: 1 + i % 2 for i, name in enumerate(operator.fields)}
    values = {n: bool(v) if operator.fields[n][1] == "Bool" else v for n, v in values.items()}
    network = Network()
    index = network.variable("x", (1,), None)
    network.operator(kind, [index], [index], **values)
    model = parsed(network.serialise("test"))
    code = model.OperatorCodes(0)
    assert code.BuiltinCode() == getattr(published().BuiltinOperator, kind)
    assert code.DeprecatedBuiltinCode() == min(code.BuiltinCode(), 127)
    found = model.Subgraphs(0).Operators(0)
    if not operator.options:
        return
    names = {v: k for k, v in vars(published().BuiltinOptions).items() if isinstance(v, int)}
    options = getattr(published(), names[found.BuiltinOptionsType()])()
    options.Init(found.BuiltinOptions().Bytes, found.BuiltinOptions().Pos)
    for name, value in values.items():
        accessor = SPELLING.get(name, name.title().replace("_", ""))
        assert getattr(options, accessor)() == value


def test_types_and_modes_are_those_of_the_schema() -> None:
    for name, code in schema.TENSOR_TYPES.items():
        assert getattr(published().TensorType, name.upper()) == code
    modes = published().ActivationFunctionType
    for name in ("NONE", "RELU", "RELU6", "RELU_N1_TO_1"):
        assert getattr(modes, name) == getattr(schema, name)
    assert (published().Padding.SAME, published().Padding.VALID) == (schema.SAME, schema.VALID)
    assert published().MirrorPadMode.REFLECT == schema.REFLECT


def test_codes_and_scales_are_those_of_the_graph() -> None:
    graph = quantize(build(MIXED))
    model = parsed(tflite.write(graph))
    subgraph = model.Subgraphs(0)
    tensors = [subgraph.Tensors(i) for i in range(subgraph.TensorsLength())]
    by_name = {t.Name().decode(): t for t in tensors}
    for node in graph.graph:
        if node.op_type != "Conv":
            continue
        weight = node.inputs[1].producer()
        codes, scales = (v.const_value.numpy() for v in weight.inputs[:2])
        tensor = by_name[f"{node.name}/weight"]
        depthwise = node.attributes.get_int("group", 1) > 1
        data = model.Buffers(tensor.Buffer()).DataAsNumpy().view(np.int8)
        stored = data.reshape(tensor.ShapeAsNumpy())
        expected = codes.transpose(1, 2, 3, 0) if depthwise else codes.transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(stored, expected)
        np.testing.assert_array_equal(tensor.Quantization().ScaleAsNumpy(), scales)
        assert tensor.Quantization().QuantizedDimension() == (3 if depthwise else 0)
        assert not tensor.Quantization().ZeroPointAsNumpy().any()


def test_weights_are_aligned_and_stored_once() -> None:
    data = tflite.write(quantize(build(MIXED)))
    model = parsed(data)
    held = []
    for index in range(model.BuffersLength()):
        buffer = model.Buffers(index)
        if buffer.DataLength():
            start = buffer._tab.Vector(buffer._tab.Offset(4))
            assert start % ALIGNMENT == 0
            held.append(bytes(buffer.DataAsNumpy()))
    assert len(held) > 10
    assert data[4:8] == b"TFL3"


def test_names_and_layout_of_inputs_and_outputs() -> None:
    program = Program(tflite.write(quantize(build(MIXED))))
    signature = program.interpreter.get_signature_list()["serving_default"]
    assert signature == {"inputs": ["x"], "outputs": ["y"]}
    (given,), (taken,) = (
        program.interpreter.get_input_details(),
        program.interpreter.get_output_details(),
    )
    assert (given["name"], [*given["shape"]], given["dtype"]) == ("x", [1, 12, 12, 3], np.float32)
    assert (taken["name"], [*taken["shape"]], taken["dtype"]) == ("y", [1, 5], np.float32)


def test_the_same_twice() -> None:
    assert tflite.write(quantize(build(MIXED))) == tflite.write(quantize(build(MIXED)))


def test_four_bit_weights_are_bytes() -> None:
    model = build(MIXED)
    graph = quantize(model, "w4a8")
    assert ir.DataType.INT4 in {v.dtype for v in graph.graph.initializers.values()}
    program = Program(tflite.write(graph))
    assert program.run(samples(model, 1)[0])[0].shape == (1, 5)


def test_four_bit_activations_are_cut_to_their_codes() -> None:
    """They are bytes on a grid of 16 codes; MAXIMUM and MINIMUM keep to it."""
    model = build(MIXED)
    graph = quantize(model, "w4a4")
    program = Program(tflite.write(graph))
    assert {"MAXIMUM", "MINIMUM"} <= {*program.kinds}
    for sample in samples(model, 4, seed=9):
        off = np.abs(program.run(sample)[0] - run(graph, sample)[0]) / output_scale(graph)
        assert off.max() < 1.01


def activations(data: bytes) -> list[int]:
    """The fused activation of every convolution."""
    subgraph = parsed(data).Subgraphs(0)
    found = []
    for index in range(subgraph.OperatorsLength()):
        operator = subgraph.Operators(index)
        if operator.BuiltinOptionsType() == published().BuiltinOptions.Conv2DOptions:
            options = published().Conv2DOptions()
            options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
            found.append(options.FusedActivationFunction())
    return found


@pytest.mark.parametrize(
    ("low", "high", "factor", "expected"),
    [
        (0.0, 6.0, 0.0, schema.NONE),  # the grid is 0 … 6
        (0.0, 6.0, 0.3, schema.RELU),  # … and below it, for the other half of the Concat
        (0.0, 6.0, 9.0, schema.RELU6),
        (-1.0, 1.0, 9.0, schema.RELU_N1_TO_1),
        (0.0, 2.0, 9.0, schema.NONE),  # MAXIMUM and MINIMUM instead
    ],
)
def test_activations_are_fused_unless_the_grid_implies_them(
    low: float, high: float, factor: float, expected: int
) -> None:
    text = f"""n (float[1, 4, 5, 5] x) => (float[] z)
    <float[4,4,1,1] w, float[4] b, float[2,4,1,1] u, float[3,6,1,1] v, float lo = {{{low}}},
    float hi = {{{high}}}> {{
        c = Conv(x, w, b)
        r = Clip(c, lo, hi)
        d = Conv(x, u)
        k = Concat<axis=1>(r, d)
        z = Conv(k, v) }}"""
    other = np.random.default_rng(0).standard_normal((2, 4, 1, 1)) * factor
    model = build(text, b=np.full(4, 5.0), u=other)
    graph = quantize(model)
    data = tflite.write(graph)
    assert activations(data)[0] == expected
    program = Program(data)
    assert ("MINIMUM" in program.kinds) == (high == 2.0)
    for sample in samples(model, 4, seed=9):
        off = np.abs(program.run(sample)[0] - run(graph, sample)[0]) / output_scale(graph)
        assert off.max() < 1.01
