"""Weights rounded to half: which, how, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgepipe import passes
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.quantization import half
from edgepipe.quantization.graph import constant
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from quantization.networks import MIXED, build

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@pytest.fixture
def context() -> Context:
    return Context(Target.load("host"), Recipe("fp16"))


def canonical(context: Context) -> ir.Model:
    return passes.run(build(MIXED), context)


def linear(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in LINEAR]


def scaled(model: ir.Model, factor: float) -> ir.Value:
    """Multiply the first weight by ``factor``."""
    weight = linear(model)[0].inputs[1]
    assert weight is not None
    weight.const_value = ir.tensor(constant(weight) * np.float32(factor), name=weight.name)
    return weight


def test_weights_become_halves_and_everything_else_stays(context: Context) -> None:
    before = canonical(context)
    after = half.apply(before, context)
    pairs = list(zip(linear(before), linear(after), strict=True))
    assert len(pairs) > 3
    for old, new in pairs:
        cast = new.inputs[1].producer()  # type: ignore[union-attr]
        assert cast is not None and cast.op_type == "Cast"
        stored = constant(cast.inputs[0])
        assert stored is not None and stored.dtype == np.float16
        weight = constant(old.inputs[1])
        assert weight is not None and weight.dtype == np.float32, "the model given is unchanged"
        np.testing.assert_array_equal(stored, weight.astype(np.float16))
        for a, b in zip(old.inputs[2:], new.inputs[2:], strict=True):
            np.testing.assert_array_equal(constant(a), constant(b))
    names = {w.name for old, _ in pairs for w in (old.inputs[1],)}  # type: ignore[union-attr]
    assert not names & after.graph.initializers.keys(), "float weights are dropped"
    assert not context.notes or not any(note.warning for note in context.notes)


def test_what_half_cannot_hold_is_refused_by_name(context: Context) -> None:
    model = canonical(context)
    weight = scaled(model, 1e7)
    with pytest.raises(UserError, match="beyond half precision") as error:
        half.apply(model, context)
    assert error.value.where == weight.name


def test_the_largest_half_is_no_overflow(context: Context) -> None:
    model = canonical(context)
    weight = linear(model)[0].inputs[1]
    assert weight is not None
    array = constant(weight)
    assert array is not None
    for value, fine in ((65504.0, True), (65519.9, True), (65520.0, False)):
        changed = array.copy()
        changed.reshape(-1)[0] = -value
        weight.const_value = ir.tensor(changed, name=weight.name)
        if fine:
            half.apply(model, context)
        else:
            with pytest.raises(UserError):
                half.apply(model, context)


def test_weights_that_vanish_are_a_warning(context: Context) -> None:
    model = canonical(context)
    weight = scaled(model, 1e-9)
    half.apply(model, context)
    assert any(n.warning and n.subject == weight.name for n in context.notes)
