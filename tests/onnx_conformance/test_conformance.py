"""ONNX operator conformance: edge core, compiled as bundles are, against a committed status."""

from __future__ import annotations

import json
import os

import numpy as np
import onnx
import pytest

from tests.onnx_conformance import table
from tests.onnx_conformance.cases import Case, edge_core
from tests.onnx_conformance.run import STATUS, run
from tests.onnx_conformance.worker import TOLERANCES, compare

COMMITTED: dict[str, str] = json.loads(STATUS.read_text(encoding="utf-8"))

#: Without the slow marker every this many-th case runs.
SAMPLE = 12


def _check(names: list[str]) -> None:
    results = run(names)
    bad = {n: r for n, r in results.items() if r[0] in ("wrong", "crashed")}
    assert not bad, bad
    lost = {n: r for n, r in results.items() if COMMITTED[n] == "passed" and r[0] != "passed"}
    assert not lost, f"passed before: {lost}"
    gained = [n for n, r in results.items() if COMMITTED[n] != "passed" and r[0] == "passed"]
    assert not gained, f"run python -m tests.onnx_conformance.run --write and commit: {gained}"
    unclear = {n: r for n, r in results.items() if r[0] == "refused" and len(r[1]) < 20}
    assert not unclear, unclear


@pytest.mark.slow
def test_committed_status_covers_exactly_edge_core() -> None:
    assert set(COMMITTED) == set(edge_core())


def test_committed_status_meets_the_goal() -> None:
    values = list(COMMITTED.values())
    assert values.count("passed") >= 1400
    assert set(values) == {"passed", "refused"}


@pytest.mark.slow
def test_sample_of_cases() -> None:
    _check(sorted(COMMITTED)[::SAMPLE])


@pytest.mark.slow
def test_all_cases() -> None:
    _check(sorted(COMMITTED))


@pytest.mark.slow
def test_operator_table_is_up_to_date() -> None:
    assert table.DOCUMENT.read_text(encoding="utf-8") == table.render()


def _case(expected: list[float]) -> Case:
    return Case("c", onnx.ModelProto(), {}, [np.array(expected, np.float32)], 1e-3, 1e-7)


def test_comparison_notices_a_wrong_value() -> None:
    right = np.array([1.0, 2.0, 4.0], np.float32)
    assert compare(_case([1.0, 2.0, 4.0]), [right])[0] == "passed"
    assert compare(_case([2.0, 1.0, 4.0]), [right])[0] == "wrong"
    assert compare(_case([1.0, 2.0, 8.0]), [right])[0] == "wrong"


def test_comparison_notices_type_shape_and_count() -> None:
    right = np.array([1.0], np.float32)
    assert compare(_case([1.0]), [right.astype(np.float64)])[0] == "wrong"
    assert compare(_case([1.0]), [right[0]])[0] == "wrong"
    assert compare(_case([1.0]), [right, right])[0] == "wrong"


@pytest.mark.slow
def test_a_crash_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "EDGEPIPE_CONFORMANCE_CRASH", "test_abs")
    results = run(["test_add", "test_abs", "test_sub"])
    assert {n: r[0] for n, r in results.items()} == {
        "test_add": "passed",
        "test_abs": "crashed",
        "test_sub": "passed",
    }


def test_tolerance_exceptions_name_cases_and_reasons() -> None:
    assert set(TOLERANCES) <= set(COMMITTED)
    assert all(why for _, _, why in TOLERANCES.values())
