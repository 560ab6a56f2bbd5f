"""Files of records: whole lines, torn lines, keys, stale records."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgepipe import pipeline, records
from edgepipe.context import Context, Note
from edgepipe.errors import UserError
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.integer_ops import Limits, QConvOp, Residual
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp
from edgepipe.kernels.template import KernelTemplate, select
from edgepipe.lowering.emit import choose_knobs, plain
from edgepipe.recipe import Recipe
from edgepipe.records import Record
from edgepipe.target import Target

PI = Target.load("raspberry-pi-4")
OP = ConvOp(Blocked(1, 16, 9, 9, 4), Blocked(1, 32, 9, 9, 4), (1, 1), epilogue=(Step("relu"),))


def template() -> KernelTemplate:
    found, _ = select(OP, PI)
    assert found is not None
    return found


def record(**changes: object) -> Record:
    """One for OP, with another setting than the default rule's."""
    own = template()
    default = own.default(OP, PI)
    knobs = next(k for k in own.settings(OP, PI) if k != default)
    base = Record(own.name, own.version, records.op_key(OP), records.features(PI), plain(knobs),
                  0.9, 1234.0, "ns", "a core", 8, 0)  # fmt: skip
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def context(path: Path) -> Context:
    return Context(PI, Recipe.parse("fp32"), records=records.read(path))


def test_what_was_appended_is_read_and_the_last_one_counts(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, record())
    records.append(path, record(op="another"))
    records.append(path, record(ratio=0.5))
    found = records.read(path)
    assert not found.remarks
    assert found.find("conv", OP, PI) == record(ratio=0.5)
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 20, 150])
def test_a_torn_line_costs_that_record_alone(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, record(op="first"))
    records.append(path, record(op="second"))
    path.write_bytes(path.read_bytes()[:-cut])
    records.append(path, record())
    found = records.read(path)
    kept = {"first", records.op_key(OP)} | ({"second"} if cut == 1 else set())
    assert {key[1] for key in found.by_key} == kept
    assert len(found.remarks) == (0 if cut == 1 else 1)


@pytest.mark.parametrize("line", ["[]", "{}", "null", '{"knobs": 1}', "\ufffd", "{" * 2000])
def test_lines_that_are_no_records_are_said(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    records.append(path, record())
    found = records.read(path)
    assert len(found.by_key) == 1
    assert found.remarks == ("r.jsonl, line 1: no whole record of this version; left out",)


def test_several_may_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"

    def append_many(name: str) -> None:
        for _ in range(50):
            records.append(path, record(op=name, measured_on="x" * 500))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(append_many, "abc"))
    assert not records.read(path).remarks
    # A writer may take another one's line for torn while it grows: that costs an empty line.
    assert sum(bool(line) for line in path.read_text().splitlines()) == 150


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        records.read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be written"):
        records.append(tmp_path / "none" / "r.jsonl", record())


def test_knobs_of_a_record_are_used(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, record())
    own = template()
    knobs, origin = choose_knobs(own, OP, context(path), "node")
    assert (plain(knobs), origin) == (record().knobs, "r.jsonl")
    assert knobs != own.default(OP, PI)
    # Nothing is taken for another operator, another core, another template.
    other = dataclasses.replace(OP, strides=(2, 2))
    assert choose_knobs(own, other, context(path)) == (own.default(other, PI), "")
    five = dataclasses.replace(context(path), target=Target.load("raspberry-pi-5"))
    assert choose_knobs(own, OP, five)[1] == ""
    named = dataclasses.replace(own, name="another")
    assert choose_knobs(named, OP, context(path))[1] == ""


def test_knobs_that_came_after_a_record_are_as_the_default_rule_has_them(tmp_path: Path) -> None:
    own, full = template(), record()
    default = plain(own.default(OP, PI))
    newer = next(k for k in default if default[k] == full.knobs[k])
    path = tmp_path / "r.jsonl"
    records.append(path, record(knobs={k: v for k, v in full.knobs.items() if k != newer}))
    knobs, origin = choose_knobs(own, OP, context(path))
    assert (plain(knobs), origin) == (full.knobs, "r.jsonl")


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"version": 0}, "made for version 0 of conv, this is 1"),
        ({"knobs": {"pixels": 99}}, "its setting is not among those on offer"),
        ({"knobs": {"gone": 1}}, "its setting is not among those on offer"),
    ],
)
def test_stale_records_are_left_out_with_a_note(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    path = tmp_path / "r.jsonl"
    records.append(path, record(**changes))
    own, seen = template(), context(path)
    assert choose_knobs(own, OP, seen, "node") == (own.default(OP, PI), "")
    (note,) = seen.notes
    assert note.subject == "node"
    assert why in note.text
    assert "r.jsonl" in note.text


def test_data_is_no_part_of_the_key_and_shapes_are() -> None:
    x, y = Blocked(1, 16, 5, 5, 16, dtype="int8", zero=3), Blocked(1, 16, 5, 5, 16, dtype="int8")
    op = QConvOp(x, y, (3, 3), Limits(-1, 1), short_sums=(3, 6), residuals=(Residual(y, 0.5),))
    same = dataclasses.replace(op, x=dataclasses.replace(x, zero=-7), limits=Limits(-3, 3, True),
                               short_sums=(9,), residuals=(Residual(y, 0.25),))  # fmt: skip
    assert records.op_key(op) == records.op_key(same)
    wider = dataclasses.replace(y, w=6)
    for other in (dataclasses.replace(op, y=wider), dataclasses.replace(op, bits=4),
                  dataclasses.replace(op, limit=63), dataclasses.replace(op, strides=(2, 1)),
                  dataclasses.replace(op, residuals=(Residual(wider, 0.5),))):  # fmt: skip
        assert records.op_key(other) != records.op_key(op)


def test_records_that_come_along_serve_this_version() -> None:
    from edgepipe.kernels.template import templates

    found = records.shipped()
    assert not found.remarks
    versions = {t.name: t.version for t in templates()}
    assert all(versions[r.template] == r.version for r in found.by_key.values())
    assert all(r.ratio < 1 for r in found.by_key.values())
    assert json.dumps([dataclasses.asdict(r) for r in found.by_key.values()]).isascii()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["x86-64-v3", "wasm-simd"])
def test_records_that_come_along_are_used(tmp_path: Path, target: str) -> None:
    """Every one for MobileNetV1: one whose setting is no longer on offer would help nobody."""
    notes: list[Note] = []
    bundle = pipeline.compile("mobilenet-v1", target=target, output=tmp_path / "b", notes=notes)
    assert not [note for note in notes if "stale" in note.text]
    tuned = {(k["kernel"], k["knobs"]) for k in bundle.manifest["kernels"] if k["tuned"]}
    own = records.features(Target.load(target))
    assert len(tuned) == sum(r.features == own for r in records.shipped().by_key.values())
