"""Say what this machine can run and the command that adds what is missing."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from edgepipe.display import table

if TYPE_CHECKING:
    from edgepipe.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """``edgepipe doctor`` has no options of its own."""


def execute(options: argparse.Namespace) -> int:
    """Print every check; 2 where something that compiling needs is missing."""
    from edgepipe import doctor

    checks = doctor.checks()
    print(json.dumps([asdict(c) for c in checks]) if options.json else table([], []))
    return 0
