"""The cache of exported zoo networks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgepipe import importer, zoo
from edgepipe.errors import UserError
from edgepipe.importer import cache

pytestmark = pytest.mark.needs_torch


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edgepipe" / "zoo"


@pytest.mark.slow
def test_second_load_does_without_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = importer.load("espcn")
    (file,) = folder.iterdir()
    assert file.stem.endswith(first.sha256)
    for name in ("torch", "onnxscript", "edgepipe.zoo.weights", "edgepipe.importer.from_torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert importer.load("espcn").sha256 == first.sha256


@pytest.mark.usefixtures("folder")
def test_empty_cache_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"edgepipe\[torch\]"):
        importer.load("espcn")


@pytest.mark.slow
def test_damaged_file_is_replaced(folder: Path) -> None:
    sha256 = importer.load("espcn").sha256
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    assert importer.load("espcn").sha256 == sha256
    assert cache.read("espcn", _key()) is not None


def test_older_exports_at_the_same_shapes_go(folder: Path) -> None:
    shapes, sources = _key().split("-")
    cache.write("espcn", f"{shapes}-{'0' * 16}", b"old")
    cache.write("espcn", f"{'1' * 8}-{sources}", b"other shapes")
    cache.write("espcn-large", f"{shapes}-{'0' * 16}", b"other network")
    cache.write("espcn", _key(), b"new")
    kept = {path.read_bytes() for path in folder.iterdir()}
    assert kept == {b"new", b"other shapes", b"other network"}


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.write("espcn", _key(), b"x")
    assert cache.read("espcn", _key()) is None


def test_key_depends_on_shapes_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = zoo.describe("espcn")
    before = cache.key(entry, {"input": (1, 1, 8, 8)})
    assert before != cache.key(entry, {"input": (1, 1, 8, 9)})
    (tmp_path / "weights.py").write_text("changed")
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "__init__.py"))
    assert before != cache.key(entry, {"input": (1, 1, 8, 8)})


def _key() -> str:
    entry = zoo.describe("espcn")
    return cache.key(entry, {i.name: i.shape for i in entry.inputs})
