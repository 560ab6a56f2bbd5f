"""The command line. One file per subcommand; each imports what is heavy when it is executed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from edgepipe.cli.guard import guarded
from edgepipe.cli.limits import Limits, supervised
from edgepipe.cli.parser import build_parser, parse


def program() -> int:
    """``edgepipe``: ``main`` with the process's arguments, in a process of its own."""
    return _run(sys.argv[1:], watched=True)


def main(argv: Sequence[str]) -> int:
    """Run ``edgepipe`` with ``argv`` in this process, without limits; return the exit code.

    0 fine, 1 validation failed, 2 the user's input or environment is at fault, 3 a bug.
    """
    return _run(list(argv), watched=False)


def _run(arguments: list[str], *, watched: bool) -> int:
    return guarded(lambda: _dispatch(arguments, watched), debug="--debug" in arguments)


def _dispatch(arguments: list[str], watched: bool) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return 0
    options: argparse.Namespace = parse(parser, arguments)
    if not watched:
        return _execute(options)
    return supervised(lambda: _execute(options), Limits.of(options))


def _execute(options: argparse.Namespace) -> int:
    code: int = options.execute(options)
    return code
