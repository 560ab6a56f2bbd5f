"""A short run of every kind, the same inputs each time; and that the watch sees what it must."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import kinds, run
from tests.fuzz.mutations import damaged_bytes, damaged_text, damaged_tree, toml
from tests.fuzz.worker import Watch, judge

#: Another one finds other things: CONTRIBUTING.md has the long runs.
SEED = os.environ.get("EDGEPIPE_FUZZ_SEED", "470927074")
COUNTS = {"onnx": 150, "compile": 6, "target": 60, "recipe": 150, "config": 100, "data": 100,
          "bundle": 80, "c-api": 100, "pt2": 40}  # fmt: skip


@pytest.mark.slow
@pytest.mark.needs_torch
@pytest.mark.parametrize("kind", kinds.KINDS)
def test_damaged_inputs_are_refused_or_compiled(kind: str) -> None:
    print(f"seed {SEED}")
    tally = run.fuzz(kind, SEED, list(range(COUNTS[kind])))
    assert not tally.findings, f"seed {SEED}: {tally.findings[:3]}"
    assert sum(tally.codes.values()) == COUNTS[kind]
    assert kind == "c-api" or tally.codes[2], "nothing was refused: the damage does nothing"


def test_an_input_depends_on_its_seed_alone(tmp_path: Path) -> None:
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        kinds.damaged_model(random.Random("1:onnx:5"), folder, wide=False)
        made.append((folder / "m.onnx").read_bytes())
    assert made[0] == made[1]


def test_damage_changes_something() -> None:
    seeded = random.Random(3)
    tree = {"a": {"b": [1, 2]}, "c": "text"}
    assert any(damaged_tree(seeded, tree) != tree for _ in range(3))
    assert tree == {"a": {"b": [1, 2]}, "c": "text"}
    assert any(damaged_bytes(seeded, b"abcdef") != b"abcdef" for _ in range(3))
    assert any(damaged_text(seeded, "a = 1\nb = 2") != "a = 1\nb = 2" for _ in range(3))
    assert toml({"k": {"x": "a\nb", "y": [True, 1.5]}}) == (
        '"k" = {"x" = "a\\U0000000ab", "y" = [true, 1.5]}\n'
    )


@pytest.mark.parametrize(
    ("code", "said", "right"),
    [
        (0, "", True),
        (0, "warning: conv1: synthetic\n", True),
        (0, "Traceback", False),
        (2, "error: m.onnx: the file is empty; export the model again\n", True),
        (2, "error: a\nb\n", False),
        (2, "", False),
        (2, "error: \x1b[2J\n", False),
        (2, f"error: {'a' * 2000}\n", False),
        (3, "error: a bug in edgepipe (KeyError: 'x')\n", False),
        (-11, "", False),
    ],
)
def test_what_is_a_right_answer(code: int, said: str, right: bool) -> None:
    assert (judge(code, said) == []) is right


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return Watch([tmp_path_factory.mktemp("allowed")])


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: (folder / "x").write_text("x"),
        lambda folder: (folder / "d").mkdir(),
        lambda folder: (folder / "l").symlink_to("x"),
        lambda folder: os.system("true"),
        lambda folder: __import__("pickle").loads(b"cos\ngetpid\n."),
        lambda folder: __import__("subprocess").run([sys.executable, "-c", ""], check=True),
    ],
)
def test_the_watch_sees(watch: Watch, tmp_path: Path, act: Callable[[Path], object]) -> None:
    watch.found, watch.on = [], True
    try:
        act(tmp_path)
    finally:
        watch.on = False
    assert watch.found
    watch.found, watch.on = [], True
    try:
        (Path(watch.allowed[0]) / "x").write_text("x")
    finally:
        watch.on = False
    assert watch.found == []


@pytest.mark.slow
def test_a_worker_that_dies_or_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "GIVE_UP_S", 2.0)
    for ending, word in (("os.abort()", "ended with -6"), ("time.sleep(60)", "no end within")):
        monkeypatch.setenv("EDGEPIPE_FUZZ_CONTROL", ending)
        tally = run.fuzz("control", "1", [0])
        assert word in tally.findings[0][1][0]


def coverage(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz.coverage", "--seed", "1", *options]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(run.ROOT)},
                          capture_output=True, text=True, check=False, timeout=300)  # fmt: skip


@pytest.mark.slow
@pytest.mark.needs_atheris
def test_coverage_finds_what_chance_does_not(tmp_path: Path) -> None:
    done = coverage(tmp_path, "--kind", "maze", "--seconds", "200")
    assert "the end of the maze" in done.stdout + done.stderr
    (found,) = tmp_path.glob("crash-*")
    again = coverage(tmp_path, "--kind", "maze", "--only", str(found))
    assert "the end of the maze" in again.stdout + again.stderr
    assert not run.fuzz("maze", "1", list(range(2000))).findings


@pytest.mark.slow
@pytest.mark.needs_atheris
@pytest.mark.parametrize("kind", ["onnx", "recipe", "bundle"])
def test_inputs_towards_new_code_are_refused_or_taken(tmp_path: Path, kind: str) -> None:
    done = coverage(tmp_path, "--kind", kind, "--inputs", "200", "--corpus", "kept")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert any((tmp_path / "kept").iterdir())
