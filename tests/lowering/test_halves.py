"""Which row-major values become halves, and which stay float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe.context import Context
from edgepipe.lowering import groups, halves
from edgepipe.recipe import Recipe
from edgepipe.target import Target

W = np.ones((6, 6), np.float32)


def stored(
    nodes: list[tuple[str, list[str], str]], constants: Mapping[str, np.ndarray],
    target: str = "jetson-tx2", recipe: str = "fp16",
) -> tuple[dict[str, str], ir.Graph]:  # fmt: skip
    """The dtype of each value of a graph from ``x[1, 4, 6]`` to ``y`` after ``halves.store``."""
    made = [helper.make_node(op, inputs, [out], name=out) for op, inputs, out in nodes]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 6]) for n in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    proto = helper.make_graph(made, "g", infos[:1], infos[1:], tensors)
    opset = [helper.make_opsetid("", 18)]
    model = ir.from_proto(helper.make_model(proto, opset_imports=opset))
    for node in model.graph:
        out = node.outputs[0]
        turned = node.op_type == "Transpose"
        out.shape = ir.Shape([6, 4, 1] if turned else [1, 4, 6])
        out.type = ir.TensorType(ir.DataType.FLOAT)
    context = Context(Target.load(target), Recipe.parse(recipe))
    halves.store(model.graph, groups.find(model.graph, context), context)
    every = (v for node in model.graph.all_nodes() for v in node.outputs)
    return {v.name or "": str(v.dtype) for v in every}, model.graph


#: Product, two moves with a scaling between them, product.
CHAIN = [("MatMul", ["x", "w"], "a"), ("Transpose", ["a"], "b"), ("Mul", ["b", "c"], "d"),
         ("Transpose", ["d"], "e"), ("MatMul", ["e", "w"], "y")]  # fmt: skip


def test_products_and_what_moves_elements_between_them() -> None:
    chain, scale = [*CHAIN[:1], ("Mul", ["a", "c"], "d"), ("MatMul", ["d", "w"], "y")], 0.3
    got, graph = stored(chain, {"w": W, "c": np.array([scale], np.float32)})
    # The scaling fuses into the product: what it gives is what is stored.
    assert got == {"a": "FLOAT", "d": "FLOAT16", "y": "FLOAT"}
    got, graph = stored(CHAIN, {"w": W, "c": np.array([scale], np.float32)})
    assert got == {**dict.fromkeys("abde", "FLOAT16"), "y": "FLOAT"}
    (node,) = (n for n in graph if n.op_type == "Mul")
    assert node.inputs[1] is not None and node.inputs[1].const_value is not None
    constant = node.inputs[1].const_value.numpy()
    assert constant.dtype == np.float16 and constant[0] == np.float16(scale)


@pytest.mark.parametrize("factor", [1e6, 1e-7], ids=["beyond halves", "below their precision"])
def test_constants_that_halves_do_not_hold_keep_their_neighbours_float(factor: float) -> None:
    got, _ = stored(CHAIN, {"w": W, "c": np.array([factor], np.float32)})
    assert set(got.values()) == {"FLOAT"}


@pytest.mark.parametrize("last", ["Exp", "Sin"])
def test_one_other_reader_keeps_a_value_and_what_it_is_moved_from_float(last: str) -> None:
    nodes = [*CHAIN[:4], (last, ["b"], "f"), *CHAIN[4:]]
    got, _ = stored(nodes, {"w": W, "c": np.array([0.3], np.float32)})
    assert got["a"] == got["b"] == got["d"] == got["e"] == "FLOAT"


def test_outputs_of_the_network_stay_float() -> None:
    got, _ = stored([("MatMul", ["x", "w"], "a"), ("Softmax", ["a"], "y")], {"w": W})
    assert got == {"a": "FLOAT16", "y": "FLOAT"}


@pytest.mark.parametrize(
    ("target", "recipe"), [("jetson-tx2", "fp32"), ("host", "fp16"), ("raspberry-pi-5", "fp16")]
)
def test_other_recipes_and_targets_store_float32(target: str, recipe: str) -> None:
    got, _ = stored(CHAIN, {"w": W, "c": np.array([0.3], np.float32)}, target, recipe)
    assert set(got.values()) == {"FLOAT"}
