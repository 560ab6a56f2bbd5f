"""Random graphs of all operators with three recipes on the host and in WebAssembly.

The seeds are fixed; more by hand: ``python -m tests.random_graphs --count 2000``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe.kernels import requantize, template
from edgepipe.passes import canonical
from tests.random_graphs.builder import Builder, RejectedError
from tests.random_graphs.generate import Case, Expected, random_graph
from tests.random_graphs.minimise import minimise, status_of
from tests.random_graphs.run import run, trials_of
from tests.random_graphs.trial import RECIPES
from tests.random_graphs.verdict import by_deviation, by_noise, in_doubles

#: Graphs of every run, how many to a test, and which of them are for WebAssembly too.
ALL, COUNT, WASM_EVERY = 200, 40, 4


@pytest.mark.slow
@pytest.mark.needs_wasmtime
@pytest.mark.parametrize("first", range(0, ALL, COUNT))
def test_random_graphs_compute_what_onnx_runtime_does(first: int) -> None:
    seeds = range(first, first + COUNT)
    print(f"seeds {seeds.start} … {seeds.stop - 1}")
    failed, counts = [], Counter[tuple[str, str]]()
    for key, status, detail in run(trials_of(seeds, WASM_EVERY)):
        counts[key[1], status] += 1
        if status in ("wrong", "crashed"):
            failed.append((*key, status, detail))
    assert not failed, failed
    assert all(counts[recipe, "right"] > COUNT // 40 for recipe in RECIPES), counts


def test_a_seed_gives_one_graph() -> None:
    first, second = (random_graph(7)[0] for _ in range(2))
    assert first.model.SerializeToString() == second.model.SerializeToString()
    assert first.model != random_graph(8)[0].model


def _expected(array: np.ndarray, error: float = 0.0) -> Case:
    """y = x, for which ONNX Runtime is said to have given ``array`` with a relative error."""
    value, kind = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype(array.dtype)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [value("x", kind, array.shape)],
        [value("y", kind, array.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    given = (array * (1 + error)).astype(array.dtype)
    return Case("identity", model, {"x": array}, {"y": Expected(given, 0.0)})


def test_the_verdict_sees_values_shapes_dtypes_and_names() -> None:
    right = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    expected = _expected(right)
    assert by_deviation({"y": right * np.float32(1 + 1e-6)}, expected).status == "right"
    assert by_deviation({"y": right[::-1]}, expected).status == "wrong"
    assert by_deviation({"y": right * np.float32(1 + 1e-4)}, expected).status == "wrong"
    assert by_deviation({"y": np.where(right > 0.9, np.nan, right)}, expected).status == "wrong"
    assert by_deviation({"y": right.astype(np.float64)}, expected).status == "wrong"
    assert by_deviation({"y": right.reshape(4, 3)}, expected).status == "wrong"
    assert by_deviation({"z": right}, expected).status == "wrong"
    whole = np.arange(5)
    assert by_deviation({"y": whole}, _expected(whole)).status == "right"
    assert by_deviation({"y": whole + (whole == 3)}, _expected(whole)).status == "wrong"


def test_rounding_of_onnx_runtime_is_not_ours() -> None:
    right = np.linspace(-1, 1, 12, dtype=np.float32)
    expected = _expected(right, 1e-4)
    assert by_deviation({"y": right}, expected).status == "right"
    assert by_deviation({"y": right * np.float32(1 - 1e-4)}, expected).status == "wrong"


def test_doubles_are_as_exact_as_they_are_said_to_be() -> None:
    x = np.float32([[-6.6, 0.3, -20.0]])
    case = _expected(x)
    case.model.graph.node[0].op_type = "Sigmoid"
    exact = (1 / (1 + np.exp(-x.astype(np.float64)))).astype(np.float32)
    np.testing.assert_array_equal(in_doubles(case.model, case.inputs)["y"], exact)


def _rounding(scale: float) -> onnx.ModelProto:
    """y = Round(x · scale)."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "s"], ["m"]), helper.make_node("Round", ["m"], ["y"])],
        "rounding",
        [value("x", TensorProto.FLOAT, [2])],
        [value("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.float32(scale), "s")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def test_what_rounding_decides_is_unclear_and_nothing_else() -> None:
    inputs = {"x": np.float32([1.0, 3.0])}
    off = {"y": np.float32([1.0, 1.0])}
    assert by_noise(off, _rounding(0.5), inputs).status == "unclear"  # of 1.5 and its neighbours
    assert by_noise(off, _rounding(0.8), inputs).status == "wrong"
    assert by_noise({"y": np.float32([1.0, 2.0])}, _rounding(0.8), inputs).status == "right"


def test_the_builder_rejects_what_cannot_be_judged() -> None:
    builder = Builder(0)
    x = builder.input(np.float32([0.5, -2.0]))
    (y,) = builder.add("Mul", [x, builder.constant(np.float32(0.1))])
    with pytest.raises(RejectedError, match="not finite"):
        builder.add("Log", [y])
    with pytest.raises(RejectedError, match="discontinuous"):
        builder.add("Equal", [y, builder.constant(y.array)])
    with pytest.raises(RejectedError, match="ONNX Runtime"):
        builder.add("Reshape", [x, builder.integers([3])])
    assert [node.op_type for node in builder.nodes] == ["Mul"]


def _first_wrong(recipe: str, looks_promising: Callable[[onnx.GraphProto], bool]) -> Case:
    """The first graph of some that is wrong with ``recipe``."""
    for seed in range(100):
        case = random_graph(seed)[0]
        promising = looks_promising(case.model.graph)
        if promising and status_of(case, recipe, "host") == "wrong":
            return case
    raise AssertionError("nothing was found")


def _pads_by_itself(graph: onnx.GraphProto) -> bool:
    return any(a.s == b"SAME_LOWER" for n in graph.node if n.op_type == "Conv" for a in n.attribute)


@pytest.mark.slow
def test_a_broken_pass_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    right = canonical._same_pads
    other = {"SAME_UPPER": "SAME_LOWER", "SAME_LOWER": "SAME_UPPER"}
    monkeypatch.setattr(canonical, "_same_pads", lambda *a: right(*a[:-1], other[a[-1]]))
    case = _first_wrong("fp32", _pads_by_itself)
    small = minimise(case, lambda c: status_of(c, "fp32", "host") == "wrong")
    assert len([n for n in small.model.graph.node if n.op_type != "Constant"]) <= 2
    monkeypatch.undo()
    assert status_of(small, "fp32", "host") == "right"


@pytest.mark.slow
def test_a_broken_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer kernels whose codes are one too large."""
    template.templates()  # those that are imported first now would keep the broken function
    right = requantize.rounded
    monkeypatch.setattr(requantize, "rounded", lambda v, zero, *rest: right(v, zero + 1, *rest))
    case = _first_wrong("w8a8", lambda g: sum(n.op_type == "Conv" for n in g.node) > 1)
    monkeypatch.undo()
    assert status_of(case, "w8a8", "host") == "right"


@pytest.mark.slow
def test_a_crash_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "EDGEPIPE_RANDOM_GRAPHS_CRASH", f"{_name(1)} w8a8 host")
    trials = [(seed, recipe, "host") for seed in (0, 1) for recipe in ("fp32", "w8a8")]
    found = {key: status for key, status, _ in run(trials)}
    assert found.pop((1, "w8a8", "host")) == "crashed"
    assert set(found.values()) == {"right"}


def _name(seed: int) -> str:
    return random_graph(seed)[0].name
