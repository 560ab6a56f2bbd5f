"""The wheel: built, installed in a clean environment, used away from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Built from the tracked and new files only, so that build leftovers cannot help."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=repository,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, copy = repository / name, folder / "source" / name
        if source.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    options = ["--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run([*command, *options], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; dependencies are lent by a path, not installed again."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # The folder is put on the path, its own .pth files (the checkout's among them) are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return folder / "bin"


def use(clean: Path, folder: Path, *command: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(clean / command[0]), *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "edgepipe/_data/targets/raspberry-pi-4.toml" in names
    assert "edgepipe/_data/calibration/digits.toml" in names
    assert "edgepipe/_data/models/digits.onnx" in names
    assert "edgepipe/py.typed" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/")) or "__pycache__" in n]
    assert wheel.stat().st_size < 2_000_000


def test_it_works_away_from_the_checkout(clean: Path, tmp_path: Path, repository: Path) -> None:
    where = use(clean, tmp_path, "python", "-c", "import edgepipe; print(edgepipe.__file__)")
    assert not Path(where.strip()).is_relative_to(repository / "edgepipe")
    assert "raspberry-pi-4" in use(clean, tmp_path, "edgepipe", "targets")
    assert "digits" in use(clean, tmp_path, "edgepipe", "models")
    assert "usage: edgepipe" in use(clean, tmp_path, "edgepipe", "--help")
    code = (
        "from edgepipe.data import named; from edgepipe.codegen.plan import TensorSpec as T;"
        "print(named.open_named('digits', [T('image', (1, 1, 8, 8), 'float32')]).count)"
    )
    assert int(use(clean, tmp_path, "python", "-c", code)) > 300


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A new environment as a user makes it: the wheel, and what it needs in the tested versions,
    none of which may have to be compiled."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    options = ["--only-binary", ":all:", "-c", str(repository / "constraints.txt"), str(wheel)]
    subprocess.run([*pip, *options], check=True, env=without_compilers(folder))
    return folder


def without_compilers(folder: Path) -> dict[str, str]:
    """This environment, with nothing to be found by its name but what was installed."""
    left_out = ("PYTHONPATH", "VIRTUAL_ENV", "CC", "CXX")
    kept = {k: v for k, v in os.environ.items() if k not in left_out}
    return {**kept, "PATH": str(folder / "bin")}


def test_it_installs_and_compiles_without_compilers(installed: Path, tmp_path: Path) -> None:
    def edgepipe(*words: str) -> str:
        done = subprocess.run(
            [str(installed / "bin" / "edgepipe"), *words], cwd=tmp_path, capture_output=True,
            text=True, env=without_compilers(installed), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    environment = without_compilers(installed)
    assert not any(shutil.which(name, path=environment["PATH"]) for name in ("cc", "gcc", "clang"))
    edgepipe("compile", "digits", "--target", "x86-64-v3", "-o", "native", "--quiet")
    edgepipe("compile", "digits", "--target", "wasm-simd", "-o", "web", "--quiet")
    assert edgepipe("validate", "native", "--data", "digits").endswith("\nok\n")
    assert "The Go Authors" in (tmp_path / "native" / "LICENCES.txt").read_text("utf-8")
    names = {c["name"] for c in json.loads(edgepipe("licences", "--json"))["components"]}
    assert {"numpy", "ziglang"} <= names and "torch" not in names


def test_tested_versions_are_the_installed_ones(repository: Path) -> None:
    """Whatever passes the tests here is what constraints.txt says: else run make lock."""
    command = [sys.executable, str(repository / ".ci" / "lock.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (repository / "constraints.txt").read_text(encoding="utf-8")
