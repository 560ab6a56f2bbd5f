"""The documents: every command in them is one that the program takes, every link leads somewhere,
and the walk for newcomers does what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from edgepipe.cli.parser import build_parser
from edgepipe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def names(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def commands(page: Path) -> list[list[str]]:
    """The words of every edgepipe command in the page's shell blocks."""
    blocks = re.findall(r"^ *```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [words[1:] for words in split if words[:1] == ["edgepipe"] and "…" not in words]


def anchors(page: Path) -> set[str]:
    """What a link may name behind the page's `#`, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_are_taken(page: Path) -> None:
    parser = build_parser()
    for words in commands(page):
        parser.parse_args(words)


def test_a_command_that_is_not_taken_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh\nedgepipe compile net.onnx --targets host   # wrong\n```\n")
    with pytest.raises(UserError):
        test_commands_are_taken(page)
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.slow
@pytest.mark.needs_wasmtime
def test_the_walk_for_newcomers(tmp_path: Path) -> None:
    given = commands(ROOT / "docs/README.md")
    assert [words[0] for words in given] == [
        "doctor", "compile", "validate", "compile", "compare",
    ]  # fmt: skip
    for words in given:
        done = subprocess.run([sys.executable, "-m", "edgepipe", *words], cwd=tmp_path,
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, (words, done.stderr)
