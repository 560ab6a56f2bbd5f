"""All passes together: the contract of ``passes.run``, trained networks, the standard's cases."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from edgepipe import passes
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.passes import shapes
from edgepipe.recipe import Recipe
from edgepipe.target import Target

from .rewriting import execute, inputs_of, model, normal, relative_error, squeeze_text

SHARED = Path(os.environ.get("EDGEPIPE_SHARED", Path(__file__).parents[2].parent / "shared"))
NETWORKS = (
    "ad_autoencoder",
    "cifar_resnet20",
    "ic_resnet8",
    "ic_resnet8_large",
    "kws_dscnn",
    "mobilenet_v2_224",
    "squeezenet_v1_0_sparse",
    "ultraface_rfb320",
    "vww_mobilenetv1_025",
)

NETWORK = """g (float[1,4,9,9] x) => (float[1,5] y)
<float[8,4,3,3] w, float[8] s, float[8] b, float[8] m, float[8] v, float[8,5] d, float[5] c> {
  h = Conv<pads=[1,1,1,1]>(x, w)
  n = BatchNormalization(h, s, b, m, v)
  r = Relu(n)
  p = GlobalAveragePool(r)
  z = Shape(p)
  zero = Constant<value_int=0>()
  axes = Constant<value_ints=[0]>()
  f = Gather(z, zero)
  u = Unsqueeze(f, axes)
  rest = Constant<value_ints=[-1]>()
  t = Concat<axis=0>(u, rest)
  q = Reshape(p, t)
  k = MatMul(q, d)
  y = Add(k, c)
}"""
WEIGHTS = {
    "w": normal(8, 4, 3, 3),
    "s": 1 + normal(8, scale=0.2),
    "b": normal(8, seed=1, scale=0.2),
    "m": normal(8, seed=2, scale=0.2),
    "v": 0.5 + abs(normal(8, seed=3, scale=0.2)),
    "d": normal(8, 5),
    "c": normal(5),
}


def context(**changes: object) -> Context:
    return Context(Target.load("x86-64-v3"), Recipe(), **changes)  # type: ignore[arg-type]


def test_small_network() -> None:
    source = model(NETWORK, **WEIGHTS)
    result = passes.run(source, context())
    ops = [node.op_type for node in result.graph]
    assert ops == ["Conv", "Relu", "GlobalAveragePool", "Reshape", "Gemm"]
    feeds = inputs_of(source)
    assert relative_error(execute(source, feeds), execute(result, feeds)) < 2e-6


def test_the_callers_model_stays_as_it_was() -> None:
    source = model(NETWORK, **WEIGHTS)
    text = squeeze_text(source)
    weights = {k: v.const_value.numpy().copy() for k, v in source.graph.initializers.items()}
    passes.run(source, context())
    assert squeeze_text(source) == text
    for name, array in weights.items():
        np.testing.assert_array_equal(source.graph.initializers[name].const_value.numpy(), array)


def test_same_input_same_result() -> None:
    source = model(NETWORK, **WEIGHTS)
    texts = [str(passes.run(source, context())) for _ in range(2)]
    assert texts[0] == texts[1]


def test_notes_name_pass_node_and_reason() -> None:
    text = NETWORK.replace("=> (float[1,5] y)", "=> (float[1,5] y, float[1,8,9,9] h)")
    ctx = context()
    passes.run(model(text, **WEIGHTS), ctx)
    notes = {(note.stage, note.text) for note in ctx.notes}
    assert (
        "passes.fuse_batchnorm",
        "BatchNormalization not folded: Conv output has 2 consumers",
    ) in notes


def test_dump_after_each_pass(tmp_path: Path) -> None:
    passes.run(model(NETWORK, **WEIGHTS), context(dump_dir=tmp_path))
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[0] == "passes-00-inline.txt"
    assert files[-1].endswith("-finite.txt")
    assert "BatchNormalization" in (tmp_path / files[0]).read_text()
    assert "BatchNormalization" not in (tmp_path / files[-1]).read_text()


def test_an_error_names_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepipe.passes import fuse_pad

    def broken(edit: object) -> int:
        raise ZeroDivisionError("deliberate")

    monkeypatch.setattr(fuse_pad, "run", broken)
    with pytest.raises(ZeroDivisionError) as caught:
        passes.run(model(NETWORK, **WEIGHTS), context())
    assert any("fuse_pad" in note for note in caught.value.__notes__)


def test_contradiction_is_one_line() -> None:
    weights = {**WEIGHTS, "d": normal(7, 5)}
    text = NETWORK.replace("float[8,5] d", "float[7,5] d")
    with pytest.raises(UserError) as caught:
        passes.run(model(text, **weights), context())
    assert "\n" not in str(caught.value)
    assert "MatMul" in str(caught.value)


def _fixed(path: Path) -> ir.Model:
    network = ir.load(path)
    for value in network.graph.inputs:
        if value.name not in network.graph.initializers:
            value.shape = ir.Shape([d if isinstance(d, int) else 1 for d in value.shape])
    return network


@pytest.mark.needs_shared
@pytest.mark.parametrize("name", NETWORKS)
def test_trained_network(name: str) -> None:
    source = _fixed(SHARED / "models" / f"{name}.onnx")
    result = passes.run(source, context())
    assert not shapes.unknown(result)
    onnx.checker.check_model(ir.serde.serialize_model(result), full_check=True)
    ops = {node.op_type for node in result.graph}
    assert not ops & {"BatchNormalization", "Constant", "Identity", "Shape", "MatMul", "Dropout"}
    feeds = inputs_of(source)
    assert relative_error(execute(source, feeds), execute(result, feeds)) < 2e-6


@pytest.mark.slow
def test_operator_cases_of_the_standard() -> None:
    """Every case the importer would let through keeps its answer, or is refused by name."""
    from onnx_conformance.cases import edge_core

    counts = {"equal": 0, "refused": 0}
    wrong = []
    for name, case in edge_core().items():
        source = ir.serde.deserialize_model(case.model)
        for value in source.graph.inputs:
            if value.name in case.inputs:
                value.shape = ir.Shape(case.inputs[value.name].shape)
        try:
            result = passes.run(source, context())
        except UserError:
            counts["refused"] += 1
            continue
        if any(_close(case, outputs) for outputs in _answers(result, case.inputs)):
            counts["equal"] += 1
        else:
            wrong.append(name)
    assert not wrong
    assert counts["equal"] > 1380, counts


def _answers(result: ir.Model, inputs: dict[str, np.ndarray]) -> list[list[np.ndarray]]:
    """By the reference evaluator and by ONNX Runtime: each has operators it gets wrong."""
    answers = []
    proto = ir.serde.serialize_model(result)
    with np.errstate(all="ignore"):
        for run in (
            lambda: ReferenceEvaluator(proto).run(None, dict(inputs)),
            lambda: execute(result, dict(inputs)),
        ):
            try:
                answers.append(run())
            except Exception:  # an operator this runtime does not have
                continue
    return answers


def _close(case: object, outputs: list[np.ndarray]) -> bool:
    expected = case.outputs  # type: ignore[attr-defined]
    return len(expected) == len(outputs) and all(
        np.asarray(a).shape == np.asarray(b).shape
        and np.asarray(a).dtype == np.asarray(b).dtype
        and np.allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), 1e-3, 1e-4, equal_nan=True
        )
        for a, b in zip(expected, outputs, strict=True)
    )


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mobilenet-v2", {"Conv": 52, "Clip": 35, "Add": 10, "Gemm": 1}),
        ("efficientnet-b0", {"Conv": 81, "Sigmoid": 65, "GlobalAveragePool": 17}),
        ("vit-tiny", {"LayerNormalization": 25, "Gelu": 12, "Softmax": 12, "Mul": 12}),
        ("text-transformer", {"LayerNormalization": 5, "Gelu": 2, "Softmax": 2}),
        ("unet-small", {"Conv": 19, "ConvTranspose": 4, "Relu": 18}),
        ("lstm", {"LSTM": 2, "Gemm": 1}),
    ],
)
def test_zoo_network(name: str, expected: dict[str, int]) -> None:
    """Exported networks: what is fused is counted, and random weights keep their answer.

    1e-4 because networks of random weights amplify rounding (up to 100 times).
    """
    from edgepipe import importer

    source = importer.load(name)
    result = passes.run(source.model, context())
    ops = [node.op_type for node in result.graph]
    assert {op: ops.count(op) for op in expected} == expected
    assert not {"BatchNormalization", "Identity", "Shape", "Constant"} & set(ops)
    assert not shapes.unknown(result)
    feeds = inputs_of(result)
    before = ir.serde.deserialize_model(source.proto)
    assert relative_error(execute(before, feeds), execute(result, feeds)) < 1e-4
