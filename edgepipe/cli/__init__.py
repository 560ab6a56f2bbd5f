"""The command line. One file per subcommand; each imports what is heavy when it is executed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edgepipe.cli.guard import guarded
from edgepipe.cli.parser import build_parser, parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``edgepipe`` with ``argv`` (default: the process's arguments); return the exit code.

    0 fine, 1 validation failed, 2 the user's input or environment is at fault, 3 a bug.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(arguments), debug="--debug" in arguments)


def _dispatch(arguments: list[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options: argparse.Namespace = parse(parser, arguments)
    code: int = options.execute(options)
    return code
