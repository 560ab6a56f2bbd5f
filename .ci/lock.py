#!/usr/bin/env python3
"""Prints constraints.txt: the versions in this environment of all that edgepipe[dev] needs.

`make lock` writes it from .venv, after its tests have passed. Newer versions to be tested come by
`rm -rf .venv; make test CONSTRAINTS=/dev/null`.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata

from packaging.requirements import Requirement

HEADER = """\
# The versions that edgepipe is tested with; make, CI and the images install them. Written by
# `make lock`. pyproject.toml says which others are allowed, and why.
"""
#: What builds the wheel and comes with virtual environments.
_LEFT_OUT = {"edgepipe", "pip", "setuptools"}


def key(name: str) -> str:
    """A project's name as indexes normalise it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(name: str, extras: set[str]) -> dict[str, str]:
    """Versions, as far as installed, of ``name[extras]`` and all that it needs here."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(name, extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (key(name), extra) in seen:
            continue
        seen.add((key(name), extra))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"{name} is not installed: make .venv/.dev first")
        # A local version (+cpu) is a build of the same sources by one index.
        found[key(name)] = package.version.partition("+")[0]
        for text in package.requires or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                waiting += [(needed.name, wanted) for wanted in ("", *needed.extras)]
    return found


def main() -> None:
    versions = closure("edgepipe", {"dev"})
    lines = [f"{name}=={versions[name]}\n" for name in sorted(versions.keys() - _LEFT_OUT)]
    sys.stdout.write(HEADER + "".join(lines))


if __name__ == "__main__":
    main()
