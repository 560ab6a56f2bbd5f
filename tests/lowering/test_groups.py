"""What fuses into which kernel, in which layout, and what is said when it does not."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from edgepipe import passes
from edgepipe.context import Context
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConcatOp, ConvOp, MapOp, MatmulOp, RelayoutOp
from edgepipe.lowering import groups, layouts, sparsity
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.lowering.running import run_model


@pytest.fixture
def context() -> Context:
    return Context(Target.load("x86-64-v3"), Recipe())


def network(body: str, inputs: str, outputs: str, **weights: tuple[int, ...]) -> ir.Model:
    """A model from ONNX text; ``weights`` are random float32 initializers of these shapes."""
    text = (
        f'<ir_version: 9, opset_import: ["" : 21]>\nmain ({inputs}) => ({outputs}) {{\n{body}\n}}'
    )
    model = ir.from_onnx_text(text)
    numbers = np.random.default_rng(0)
    for name, shape in weights.items():
        array = numbers.standard_normal(shape).astype(np.float32)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT),
                         const_value=ir.tensor(array, name=name))  # fmt: skip
        for node in model.graph:
            for i, used in enumerate(node.inputs):
                if used is not None and used.name == name:
                    node.replace_input_with(i, value)
        model.graph.register_initializer(value)
    return model


def lowered(model: ir.Model, context: Context) -> list[ir.Node]:
    graph = passes.run(model, context).graph
    model = ir.Model(graph, ir_version=9)
    found = groups.find(graph, context)
    layouts.assign(model, found, sparsity.choose(found, context), context)
    return list(model.graph)


def ops(nodes: list[ir.Node]) -> list[object]:
    return [n.meta["kernel"].op if n.domain == "edgepipe" else n.op_type for n in nodes]


def kinds(nodes: list[ir.Node]) -> list[str]:
    return [n.op_type for n in nodes]


X = "float[1,16,8,8] x"
Y = "float[1,16,8,8] y"
CONV = "Conv <pads=[1,1,1,1], kernel_shape=[3,3]>"
W = (16, 16, 3, 3)


def steps(op: object) -> list[str]:
    return [s.kind for s in op.epilogue]  # type: ignore[attr-defined]


def test_activation_fuses_into_the_convolution(context: Context) -> None:
    nodes = lowered(network(f"a = {CONV}(x, w)\ny = Relu(a)", X, Y, w=W), context)
    assert kinds(nodes) == ["Relayout", "Conv", "Relayout"]
    assert steps(ops(nodes)[1]) == ["relu"]


def test_residual_add_fuses_into_the_later_convolution(context: Context) -> None:
    body = f"a = {CONV}(x, w)\nb = Relu(a)\nc = {CONV}(b, v)\nd = Add(b, c)\ny = Relu(d)"
    nodes = lowered(network(body, X, Y, w=W, v=W), context)
    assert kinds(nodes) == ["Relayout", "Conv", "Conv", "Relayout"]
    first, second = ops(nodes)[1:3]
    assert steps(first) == ["relu"]
    assert steps(second) == ["add", "relu"]
    assert isinstance(first, ConvOp) and isinstance(second, ConvOp)
    assert second.residuals == (first.y,)


def test_a_value_with_two_readers_is_stored_and_the_reason_is_noted(context: Context) -> None:
    body = f"a = {CONV}(x, w)\nb = Sigmoid(a)\nc = {CONV}(a, v)\ny = Mul(b, c)"
    nodes = lowered(network(body, X, Y, w=W, v=W), context)
    assert "Map" in kinds(nodes)
    assert any("other readers" in n.text for n in context.notes)


def test_silu_of_a_value_that_only_gates_itself(context: Context) -> None:
    body = f"a = {CONV}(x, w)\nb = Sigmoid(a)\ny = Mul(a, b)"
    nodes = lowered(network(body, X, Y, w=W), context)
    assert steps(ops(nodes)[1]) == ["silu"]


def test_a_graph_output_in_the_middle_is_not_fused_away(context: Context) -> None:
    outputs = f"{Y}, float[1,16,8,8] a"
    nodes = lowered(network(f"a = {CONV}(x, w)\ny = Relu(a)", X, outputs, w=W), context)
    assert kinds(nodes).count("Relayout") == 3
    assert [type(o) for o in ops(nodes)].count(MapOp) == 1


def test_producer_writes_the_border_its_reader_pads_with(context: Context) -> None:
    body = f"a = {CONV}(x, w)\nb = Relu(a)\ny = {CONV}(b, v)"
    relayout, first, second, _ = ops(lowered(network(body, X, Y, w=W, v=W), context))
    assert isinstance(relayout, RelayoutOp) and relayout.y.pads == (1, 1, 1, 1)
    assert isinstance(first, ConvOp) and first.y.pads == (1, 1, 1, 1)
    assert isinstance(second, ConvOp) and second.x == first.y and not second.y.padded


def test_an_image_is_read_from_nchw_without_wasting_lanes(context: Context) -> None:
    model = network(f"y = {CONV}(x, w)", "float[1,3,8,8] x", Y, w=(16, 3, 3, 3))
    assert ops(lowered(model, context))[0].y.lanes == 1  # type: ignore[attr-defined]


def test_channel_gate_is_a_broadcast_operand(context: Context) -> None:
    body = (f"a = {CONV}(x, w)\nb = Relu(a)\ng = GlobalAveragePool(b)\n"
            "h = Conv(g, p)\ns = Sigmoid(h)\ny = Mul(b, s)")  # fmt: skip
    nodes = lowered(network(body, X, Y, w=W, p=(16, 16, 1, 1)), context)
    gate = next(o for o in ops(nodes) if isinstance(o, MapOp))
    assert gate.residuals == (Blocked(1, 16, 1, 1, 8),)


def test_concat_of_part_filled_blocks_stays_plain_and_says_why(context: Context) -> None:
    body = "a = Conv(x, w)\nb = Conv(x, v)\ny = Concat <axis=1> (a, b)"
    shape = "float[1,10,8,8] y"
    nodes = lowered(network(body, X, shape, w=(5, 16, 1, 1), v=(5, 16, 1, 1)), context)
    assert not any(isinstance(o, ConcatOp) for o in ops(nodes))
    assert any("multiple of 8" in n.text for n in context.notes)


def test_a_transposed_convolution_of_biases_alone_is_left_to_tvm(context: Context) -> None:
    """Dilation and stride may miss every input where the pads leave a single output."""
    body = (
        "y = ConvTranspose <kernel_shape=[1,4], dilations=[1,2], strides=[1,2], pads=[0,3,0,3]> "
        "(x, w, b)"
    )
    x, y = "float[1,16,8,1] x", "float[1,16,8,1] y"
    assert kinds(lowered(network(body, x, y, w=(16, 16, 1, 4), b=(16,)), context)) == [
        "ConvTranspose"
    ]
    assert any("no output sees an input" in n.text for n in context.notes)


def test_what_depends_on_shapes_alone_is_computed_while_compiling(context: Context) -> None:
    """A kernel takes flat buffers: TVM's folding of constants could not call it."""
    model = network(
        """c = EyeLike <k = -1> (x)
           n = LayerNormalization <axis = -1> (c, s, b)
           m = Softmax <axis = -1> (n)
           y = Add(x, m)
           z = Softmax <axis = -1> (y)""",
        "float[5,7] x", "float[5,7] y, float[5,7] z", s=(7,), b=(7,),
    )  # fmt: skip
    nodes = lowered(copy.deepcopy(model), context)
    assert [n.op_type for n in nodes if n.domain == "edgepipe"] == ["Softmax"]  # that of y
    x = np.random.default_rng(3).standard_normal((5, 7)).astype(np.float32)
    found = run_model(ir.to_proto(model), {"x": x})
    expected = ReferenceEvaluator(ir.to_proto(model)).run(["y", "z"], {"x": x})
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("read", ["i", "j"])
def test_a_pool_whose_indices_are_wanted_is_left_to_tvm(context: Context, read: str) -> None:
    """Also where nothing but the graph's output wants them."""
    body = f"a = {CONV}(x, w)\ny, i = MaxPool <kernel_shape=[2,2], strides=[2,2]> (a)"
    body += "\nj = Neg(i)" if read == "j" else ""
    outputs = f"float[1,16,4,4] y, int64[1,16,4,4] {read}"
    assert "MaxPool" in kinds(lowered(network(body, X, outputs, w=W), context))
    assert any("its indices are used" in n.text for n in context.notes)


def test_dense_layer_with_bias_and_activation(context: Context) -> None:
    model = network("a = Gemm <transB=1> (x, w, b)\ny = Relu(a)", "float[4,16] x",
                    "float[4,10] y", w=(10, 16), b=(10,))  # fmt: skip
    (op,) = ops(lowered(model, context))
    assert isinstance(op, MatmulOp) and op.bias and steps(op) == ["relu"]
    assert (op.m, op.k, op.n) == (4, 16, 10)


def test_batched_product_with_one_right_operand_is_more_rows(context: Context) -> None:
    model = network("a = MatMul(x, w)\ny = Add(a, b)", "float[2,7,16] x", "float[2,7,10] y",
                    w=(16, 10), b=(10,))  # fmt: skip
    op = next(o for o in ops(lowered(model, context)) if isinstance(o, MatmulOp))
    assert (op.batch, op.m) == (1, 14)


def test_unsupported_grouping_is_left_to_tvm_with_a_reason(context: Context) -> None:
    model = network("y = Conv <group=4> (x, w)", X, Y, w=(16, 4, 1, 1))
    assert kinds(lowered(model, context)) == ["Conv"]
    assert any("4 groups" in n.text for n in context.notes)


def test_lanes_follow_the_target() -> None:
    wide = dataclasses.replace(
        Target.load("x86-64-v3"),
        simd=dataclasses.replace(Target.load("x86-64-v3").simd, lanes_f32=4),
    )
    nodes = lowered(network(f"y = {CONV}(x, w)", X, Y, w=W), Context(wide, Recipe()))
    assert ops(nodes)[1].y.lanes == 4  # type: ignore[attr-defined]
