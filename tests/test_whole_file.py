"""Files that exist whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepipe import temporary, whole_file


def test_a_file_is_replaced_and_nothing_else_left(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(b"old")
    whole_file.write(path, b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(b"old")

    def fails(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        whole_file.write(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    path, other = tmp_path / "page.html", tmp_path / ".other.edgepipe-1"
    (tmp_path / ".page.html.edgepipe-killed").write_bytes(b"half")
    other.write_bytes(b"of another file")
    whole_file.write(path, b"new")
    assert sorted(tmp_path.iterdir()) == sorted([path, other])


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with temporary.file(path) as work:
        whole_file.write(path, b"new")
        assert work.exists()
    assert list(tmp_path.iterdir()) == [path]
