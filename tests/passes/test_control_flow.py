"""Cases of edgepipe/passes/control_flow.py."""

from __future__ import annotations

import numpy as np
import pytest

from edgepipe.passes import clean, control_flow

from .rewriting import assert_equal, execute, inputs_of, normal, rewrite

BRANCHES = """
  y = If (c) <
    then_branch = t () => (float[3] a) { a = Mul(x, x) },
    else_branch = e () => (float[3] b) { n = Neg(x) b = Exp(n) }
  >"""


@pytest.mark.parametrize(("value", "expected"), [(1, ["Mul"]), (0, ["Neg", "Exp"])])
def test_1_constant_condition(value: int, expected: list[str]) -> None:
    text = f"g (float[3] x) => (float[3] y) <bool c = {{{value}}}> {{ {BRANCHES} }}"
    result = rewrite(text, clean.run)
    assert result.ops == expected
    assert_equal(result, "moves data only")


def test_1_branch_gives_an_outer_value() -> None:
    text = """g (float[3] x) => (float[3] y) <bool c = {1}> {
      h = Neg(x)
      y = If (c) <
        then_branch = t () => (float[3] a) { a = Identity(h) },
        else_branch = e () => (float[3] b) { b = Exp(h) }
      >
    }"""
    result = rewrite(text, clean.run)
    assert "If" not in result.ops
    assert_equal(result, "moves data only")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_2_condition_at_run_time(seed: int) -> None:
    text = f"g (float[3] x, bool c) => (float[3] y) {{ {BRANCHES} }}"
    result = rewrite(text, clean.run)
    assert "If" not in result.ops
    assert "Where" in result.ops
    assert_equal(result, "moves data only", seed)


def test_2_integer_division_stays() -> None:
    text = """g (int64[3] x, bool c) => (int64[3] y) <int64 z = {0}> {
      y = If (c) <
        then_branch = t () => (int64[3] a) { a = Div(x, z) },
        else_branch = e () => (int64[3] b) { b = Neg(x) }
      >
    }"""
    from edgepipe.passes import inline, opset
    from edgepipe.passes.editor import Editor

    from .rewriting import model

    notes: list[str] = []
    edit = Editor(model(text), lambda subject, reason: notes.append(reason))
    inline.run(edit)
    opset.run(edit)
    assert [n.op_type for n in edit.model.graph] == ["If"]
    assert any("a branch divides" in note for note in notes)


LOOP = """g (float[3] x) => (float[3] y, float[N,3] z) <int64 n = {TRIPS}, bool go = {1}> {
  y, z = Loop (n, go, x) <body = b (int64 i, bool ci, float[3] h)
      => (bool co, float[3] o, float[3] s) {
    co = Identity(ci)
    f = Cast<to=1>(i)
    o = Add(h, f)
    s = Mul(o, o)
  }>
}"""


@pytest.mark.parametrize("trips", [0, 1, 4])
def test_3_constant_trip_count(trips: int) -> None:
    result = rewrite(LOOP.replace("TRIPS", str(trips)), clean.run)
    assert "Loop" not in result.ops
    feeds = inputs_of(result.before)
    for expected, actual in zip(
        execute(result.before, feeds), execute(result.after, feeds), strict=True
    ):
        np.testing.assert_array_equal(expected, actual)


def test_3_condition_that_folds() -> None:
    """While i < 3, without a trip count: the condition is a constant in every iteration."""
    text = """g (float[3] x) => (float[3] y) <bool go = {1}, int64 two = {2}> {
      y = Loop ("", go, x) <body = b (int64 i, bool ci, float[3] h) => (bool co, float[3] o) {
        co = Less(i, two)
        o = Add(h, h)
      }>
    }""".replace('""', "")
    result = rewrite(text, clean.run)
    assert result.ops == ["Add", "Add", "Add"]
    assert_equal(result, "moves data only")


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_4_condition_at_run_time(seed: int) -> None:
    text = """g (float[3] x) => (float[3] y) <int64 n = {6}, bool go = {1}, float top = {3.0}> {
      y = Loop (n, go, x) <body = b (int64 i, bool ci, float[3] h) => (bool co, float[3] o) {
        o = Add(h, h)
        m = ReduceMax<keepdims=0>(o)
        co = Less(m, top)
      }>
    }"""
    result = rewrite(text, clean.run)
    assert "Loop" not in result.ops
    assert_equal(result, "moves data only", seed)


@pytest.mark.parametrize(("forward", "out"), [(0, 0), (1, 0), (0, 1)])
def test_5_scan(forward: int, out: int) -> None:
    text = """g (float[2] h0, float[4,3] x) => (float[2] h, float[M,K,L] z) <int64[2] t = {1,2}> {
      h, z = Scan <num_scan_inputs=1, scan_input_axes=[1], scan_input_directions=[IN],
                   scan_output_directions=[OUT], scan_output_axes=[1],
        body = b (float[2] a, float[4] v) => (float[2] c, float[1,2] w) {
          m = ReduceSum<keepdims=0>(v)
          c = Add(a, m)
          w = Reshape(c, t)
        }> (h0, x)
    }""".replace("IN", str(forward)).replace("OUT", str(out))
    result = rewrite(text, clean.run)
    assert "Scan" not in result.ops
    assert result.ops.count("Add") == 3
    assert_equal(result)


def test_too_long_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_flow, "MAX_UNROLLED", 10)
    text = LOOP.replace("TRIPS", "4").replace("float[N,3] z", "float[4,3] z")
    from edgepipe.passes import inline, opset
    from edgepipe.passes.editor import Editor

    from .rewriting import model

    notes: list[str] = []
    edit = Editor(model(text), lambda subject, reason: notes.append(reason))
    inline.run(edit)
    opset.run(edit)
    assert "Loop kept: 4 iterations of 4 nodes are more than 10" in notes


def test_weights_of_the_body_are_shared() -> None:
    text = """g (float[2,8] x) => (float[2,8] y) <int64 n = {3}, bool go = {1}, float[8,8] w> {
      y = Loop (n, go, x) <body = b (int64 i, bool ci, float[2,8] h) => (bool co, float[2,8] o) {
        co = Identity(ci)
        o = MatMul(h, w)
      }>
    }"""
    result = rewrite(text, clean.run, w=normal(8, 8))
    assert result.ops == ["MatMul"] * 3
    assert len({id(node.inputs[1]) for node in result.after.graph}) == 1
    assert_equal(result)
