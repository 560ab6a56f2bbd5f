"""Chains of ``let`` that TVM's code generators would not come to the end of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
import tvm_ffi
from onnx import helper
from tvm import ir, tirx

from edgepipe.bundle import Bundle
from edgepipe.cli import main
from edgepipe.codegen import lets
from edgepipe.kernels.builder import kernel, load, store
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.math import bind
from edgepipe.kernels.ops import MatmulOp
from edgepipe.metrics import snr_db
from tests.kernels import reference
from tests.kernels.harness import Kernels, target_with


def _count(module: Any, kind: type) -> int:
    found = []
    for func in module.functions.values():
        tvm_ffi.structural_walk(func.body, lambda x: found.append(isinstance(x, kind)))
    return sum(found)


def _chain(length: int) -> Any:
    """y = x * 2^length as ``length`` doublings, each of the one before."""

    def body(x: Any, y: Any) -> None:
        value = load(x, 0, 4)
        for _ in range(length):
            value = bind(value, 4, lambda v: v + v)
        store(y, 0, value, 4)

    func = kernel("chain", [("x", 4, "float32"), ("y", 4, "float32")], body)
    return tvm.IRModule({"chain": func})


def test_short_chains_stay_expressions_and_long_ones_become_registers() -> None:
    short, long = _chain(lets.LENGTH), _chain(lets.LENGTH + 1)
    assert _count(lets.flatten(short), tirx.Let) == lets.LENGTH
    flat = lets.flatten(long)
    assert _count(long, tirx.Let) == lets.LENGTH + 1  # positive control
    assert _count(flat, tirx.Let) == 0
    assert _count(flat, tirx.AllocBuffer) == lets.LENGTH + 1


def test_chains_beside_one_another_do_not_add_up() -> None:
    def body(x: Any, y: Any) -> None:
        values = [bind(load(x, i, 1), 1, lambda v: v * v) for i in range(2 * lets.LENGTH)]
        store(y, 0, sum(values[1:], values[0]), 1)

    size = 2 * lets.LENGTH
    func = kernel("beside", [("x", size, "float32"), ("y", 1, "float32")], body)
    module = tvm.IRModule({"beside": func})
    assert _count(lets.flatten(module), tirx.Let) == size


def test_branches_of_a_condition_are_evaluated_only_where_it_holds() -> None:
    def body(x: Any, y: Any) -> None:
        inside: Any = x[tirx.const(2**20, "int32")]  # far outside: never to be read
        value: Any = x[0]
        for _ in range(lets.LENGTH + 1):
            inside = bind(inside, 1, lambda v: v + v)
            value = bind(value, 1, lambda v: v + v)
        store(y, 0, value + tirx.if_then_else(x[0] > 1e9, inside, tirx.const(0.0, "float32")), 1)

    func = kernel("guarded", [("x", 4, "float32"), ("y", 1, "float32")], body)
    flat = lets.flatten(tvm.IRModule({"guarded": func}))
    assert _count(flat, tirx.Let) == lets.LENGTH + 1
    conditions = []

    def visit(node: Any) -> None:
        if isinstance(node, ir.Call) and node.op.same_as(ir.Op.get("prim.if_then_else")):
            conditions.append(node)

    for func in flat.functions.values():
        tvm_ffi.structural_walk(func.body, visit)
    (condition,) = conditions
    inner: list[bool] = []
    tvm_ffi.structural_walk(condition, lambda x: inner.append(isinstance(x, tirx.Let)))
    assert sum(inner) == lets.LENGTH + 1


def test_a_long_epilogue_computes_what_it_says(tmp_path: Path) -> None:
    kinds = ["sigmoid", "hard_swish", "gelu", "silu", "tanh", "relu", "add"] * 2
    residuals = ("full",) * kinds.count("add")
    op = MatmulOp(1, 3, 8, 20, True, epilogue=tuple(map(Step, kinds)), residuals=residuals)
    kernels = Kernels([op], target_with(8, 16), tmp_path)
    values = np.random.default_rng(0)
    a, w = values.standard_normal((3, 8), "f4"), values.standard_normal((8, 20), "f4")
    operands = [values.standard_normal((3, 20), "f4") for _ in residuals]
    expected = reference.apply(op.epilogue, a.astype(np.float64) @ w, operands)
    got = kernels.run(0, [a], [w], operands, 60).reshape(3, 20)
    assert snr_db(expected, got) > 110
    assert snr_db(expected, np.roll(got, 1)) < 20  # positive control


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Sigmoid", "Sum"])
def test_forty_elementwise_operators_in_a_row(kind: str, tmp_path: Path) -> None:
    """Both compiled to one kernel, the first by TVM's own rules."""
    size, count = [1, 7], 40
    names = [f"x{i}" for i in range(count)]
    if kind == "Sum":
        nodes, inputs = [helper.make_node("Sum", names, ["y"])], names
    else:
        ends = [*names[1:], "y"]
        pairs = zip(names, ends, strict=True)
        nodes, inputs = [helper.make_node(kind, [a], [b]) for a, b in pairs], names[:1]
    infos = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, size) for n in [*inputs, "y"]]
    graph = helper.make_graph(nodes, "row", infos[:-1], infos[-1:])
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "row.onnx")
    folder = tmp_path / "bundle"
    assert main(["compile", str(tmp_path / "row.onnx"), "--target", "host", "-o", str(folder)]) == 0
    values = np.random.default_rng(1)
    given = {n: values.standard_normal(size, "f4") for n in inputs}
    expected = sum(a.astype(np.float64) for a in given.values())
    if kind == "Sigmoid":
        for _ in range(count):
            expected = 1 / (1 + np.exp(-expected))
    found = Bundle.open(folder).run(given)["y"]
    # A sum of forty may cancel: what is left has the rounding of what was added up.
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=count * 2.0**-24)
