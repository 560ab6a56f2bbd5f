"""Say what is installed and what adds the rest."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgepipe.display import pairs, table

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """``edgepipe doctor`` has no options of its own."""


def execute(options: argparse.Namespace) -> int:
    """Print every check, and the command for each that failed."""
    from edgepipe import doctor

    checks = doctor.checks()
    if options.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
        return 0
    print(table(["", "what", "found"], [["ok" if c.ok else "–", c.name, c.detail] for c in checks]))
    missing = [check for check in checks if not check.ok and check.fix]
    if missing:
        print("\nto add what is missing:")
        print(pairs((f"  {check.name}", check.fix) for check in missing))
    return 0
