"""That what kills can do to files is found."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import kills


def _write(path: Path, whole: bool) -> int:
    work = path.with_name(".work") if whole else path
    with work.open("wb") as file:
        for _ in range(10):
            file.write(b"x" * 10)
            file.flush()
            time.sleep(0.005)
    work.replace(path)
    return 0


def _check(out: Path) -> None:
    path = out / "file"
    assert not path.exists() or path.stat().st_size == 100


@pytest.mark.parametrize("whole", [True, False])
def test_partial_files_are_found(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = lambda source, out: _write(out / "file", whole)  # noqa: E731
    monkeypatch.setitem(kills.WORKS, "control", kills.Work(lambda source: None, act, _check))
    outcome = kills.torment("control", 6, "1", tmp_path / "work")
    assert outcome.kills and bool(outcome.problems) is not whole


RECORDS = b"a\nb\nc\n"


@pytest.mark.parametrize(
    ("killed", "again", "sound"),
    [
        (b"", RECORDS, True),
        (b"a\nb", b"a\nb\nb\nc\n", False),  # "b" was whole but for its end: twice
        (b"a\n{torn", b"a\n{torn\nb\nc\n", True),
        (b"a\nb\n", b"a\nc\nb\n", False),
        (b"a\nb\n", b"a\nb\nb\nc\n", False),
        (b"a\nb\n", b"a\nb\n", False),
    ],
)
def test_lost_and_double_records_are_found(killed: bytes, again: bytes, sound: bool) -> None:
    def compare() -> None:
        kills._compare_records({"r": killed}, {"r": again}, {"r": RECORDS})

    if sound:
        compare()
    else:
        with pytest.raises(AssertionError):
            compare()


def test_older_records_are_torn(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_bytes(RECORDS)
    kills._tear_records(Random(1), tmp_path)
    assert RECORDS.startswith((tmp_path / "records.jsonl").read_bytes())
    assert len((tmp_path / "records.jsonl").read_bytes()) < len(RECORDS)
