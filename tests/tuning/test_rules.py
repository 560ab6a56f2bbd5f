"""Schedules by MetaSchedule's rules: drawn again by a seed, recorded, applied, and never wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepipe import importer, lowering, passes, pipeline, records
from edgepipe.bundle import Bundle
from edgepipe.context import Context
from edgepipe.lowering import traces
from edgepipe.recipe import Recipe
from edgepipe.records import Record, Records
from edgepipe.target import Target
from edgepipe.tuning import Plan, rules

HOST = Target.load("host")


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    """A convolution in groups of 4 channels, which no template executes, and a product that one
    does."""
    numbers = np.random.default_rng(0)
    weights = {
        "w": numbers.standard_normal((12, 4, 5)).astype(np.float32) * (2 / 20) ** 0.5,
        "v": numbers.standard_normal((36, 8)).astype(np.float32) * (2 / 36) ** 0.5,
    }
    nodes = [helper.make_node("Conv", ["x", "w"], ["a"], "conv", group=3),
             helper.make_node("MatMul", ["a", "v"], ["y"], "product")]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 12, 40))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 12, 8))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    path = tmp_path / "grouped.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def left(model: Path) -> list[rules.Function]:
    """What there is to search in ``model``."""
    found: list[rules.Function] = []

    def tune(subject: Any) -> Records:
        if hasattr(subject, "functions"):
            found.extend(rules.tasks(subject, context))
        return records.NO_RECORDS

    context = Context(HOST, Recipe())
    source = importer.load(model)
    lowering.lower(passes.run(source.model, context), context, tune)
    return found


def drawn(function: Any, seed: int) -> list[Any]:
    search = rules.Search(function, 8, 10, seed)
    found = []
    while schedules := search.draw():
        found += schedules
        search.tell([None if i == 0 else 1.0 + i for i in range(len(schedules))])
    return found


def test_what_no_template_executes_is_searched_once(grouped: Path) -> None:
    (task,) = left(grouped)
    assert task.key.startswith("conv(float32[1, 12, 40], float32[12, 4, 5], ")
    assert task.key == left(grouped)[0].key
    gpu = Context(Target.load("jetson-tx2"), Recipe())
    assert rules.tasks(None, gpu) == []


def test_a_seed_draws_the_same_schedules(grouped: Path) -> None:
    (task,) = left(grouped)
    one, two, other = ([traces.text(s) for s in drawn(task.function, seed)] for seed in (1, 1, 2))
    assert one == two
    assert one != other
    assert len(one) == 10
    assert len({json.dumps(trace) for trace in one}) > 3


@pytest.mark.slow
def test_every_schedule_computes_the_same(grouped: Path, tmp_path: Path) -> None:
    (task,) = left(grouped)
    plain = bundle(grouped, tmp_path / "plain", [])
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 12, 40)).astype(np.float32)}
    wanted = plain.run(inputs, "local")["y"]
    for number, schedule in enumerate(drawn(task.function, 3)[:5]):
        trace = json.loads(json.dumps(traces.text(schedule)))
        tuned = bundle(grouped, tmp_path / str(number), [record(task, trace)])
        np.testing.assert_allclose(tuned.run(inputs, "local")["y"], wanted, rtol=1e-5, atol=1e-6)
        assert code(tuned) != code(plain), "the record changed nothing"
        assert [k["tuned"] for k in tuned.manifest["kernels"] if k["kernel"] == "conv"] == [
            f"{number}.jsonl"
        ]


@pytest.mark.slow
def test_a_network_is_tuned_with_all_it_has(grouped: Path, tmp_path: Path) -> None:
    plan = Plan(3, tmp_path / "records.jsonl")
    found = pipeline.tune(grouped, target=HOST, tuning=plan)
    assert {r.template for r in found} >= {traces.NAME, "matmul"}
    assert pipeline.tune(grouped, target=HOST, tuning=plan) == found  # nothing is measured again
    assert len(plan.file.read_text().splitlines()) == len(found)


def bundle(model: Path, output: Path, given: list[Record]) -> Bundle:
    file = output.with_suffix(".jsonl")
    file.touch()
    for one in given:
        records.append(file, one)
    notes: list[Any] = []
    made = pipeline.compile(model, target=HOST, output=output, records=file, notes=notes)
    assert not [n for n in notes if "stale" in n.text]
    return made


def code(made: Bundle) -> bytes:
    return made.file(made.code_file).read_bytes()


def record(task: rules.Function, trace: Any, **changes: Any) -> Record:
    made = Record(
        template=traces.NAME, version=traces.VERSION, op=task.key,
        features=records.features(HOST), knobs={"trace": trace}, ratio=0.5, value=1.0, unit="ns",
        measured_on="nowhere", trials=3, seed=0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 0}, "made for version 0"),
        (
            {"knobs": {"trace": [[["GetSBlock", [], ["other", "main"], ["b0"]]], []]}},
            "does not fit",
        ),
        ({"knobs": {"trace": 7}}, "does not fit"),
        ({"knobs": {"other": 7}}, "does not fit"),
    ],
)
def test_a_stale_record_is_noted(grouped: Path, changes: dict[str, Any], said: str) -> None:
    (task,) = left(grouped)
    stale = record(task, [], **changes)
    context = Context(HOST, Recipe(), records=Records({stale.key: stale}, {stale.key: "a file"}))
    assert traces.recorded(task.label, task.function, context) is None
    assert any(said in n.text and "a file" in n.text for n in context.notes)
    default = record(task, [], knobs={})
    context = Context(HOST, Recipe(), records=Records({default.key: default}, {}))
    assert traces.recorded(task.label, task.function, context) is None
    assert not context.notes
