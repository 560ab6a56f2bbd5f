"""The rule of conftest.py: in CI a skip is a failure, unless it is declared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_TESTS = """
import pytest

@pytest.mark.needs_shared
def test_shared(shared_models): pass

@pytest.mark.{marker}
def test_hardware(): pytest.skip("no such board")
"""


def outcome(tmp_path: Path, repository: Path, marker: str, **environment: str) -> tuple[int, str]:
    conftest = (repository / "tests" / "conftest.py").read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(conftest, encoding="utf-8")
    (tmp_path / "test_it.py").write_text(_TESTS.format(marker=marker), encoding="utf-8")
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "EDGEPIPE_SHARED")}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-rA",
            "-p",
            "no:randomly",
            "-W",
            "ignore",
            str(tmp_path),
        ],
        cwd=tmp_path,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_module_that_skips_itself_fails_in_ci(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "test_whole.py").write_text(
        "import pytest\npytest.skip('not today', allow_module_level=True)", encoding="utf-8"
    )
    environment = {"EDGEPIPE_SHARED": "none"}
    assert outcome(tmp_path, repository, "may_skip", **environment)[0] == 0
    code, output = outcome(tmp_path, repository, "may_skip", CI="true", **environment)
    assert code != 0
    assert "not today" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("marker", "environment", "code", "said"),
    [
        ("slow", {"EDGEPIPE_SHARED": "/nowhere"}, 0, "2 skipped"),
        ("slow", {"EDGEPIPE_SHARED": "/nowhere", "CI": "true"}, 1, "1 failed, 1 error"),
        ("may_skip", {"EDGEPIPE_SHARED": "/nowhere", "CI": "true"}, 1, "1 skipped, 1 error"),
        ("may_skip", {"EDGEPIPE_SHARED": "none", "CI": "true"}, 0, "1 skipped, 1 deselected"),
    ],
)
def test_a_skip_in_ci(
    tmp_path: Path, repository: Path, marker: str, environment: dict, code: int, said: str
) -> None:
    got, output = outcome(tmp_path, repository, marker, **environment)
    assert said in output, output
    assert got == code
