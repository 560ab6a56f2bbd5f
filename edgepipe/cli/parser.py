"""The argument parser: argparse, with every mistake one line that says what would work."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from edgepipe import __version__
from edgepipe.cli import limits
from edgepipe.errors import UserError, did_you_mean

#: Subcommands in the order of --help; each is a module of this package.
COMMANDS = (
    "compile",
    "tune",
    "run",
    "validate",
    "bench",
    "compare",
    "report",
    "demo",
    "targets",
    "models",
    "licences",
    "doctor",
)

EXIT_CODES = (
    "exit codes: 0 fine, 1 validation failed, 2 your input or environment is at fault, "
    "3 a bug in edgepipe"
)


class Parser(argparse.ArgumentParser):
    """argparse that raises UserError instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, where=self.prog, fix=f"see '{self.prog} --help'")

    def check_options(self, tokens: Sequence[str]) -> None:
        """Refuse unknown long options by name, before argparse complains of something else."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        for token in tokens:
            if token == "--":
                return
            name = token.split("=", 1)[0]
            if name.startswith("--") and name not in known:
                raise UserError(
                    f"unknown option '{name}'", where=self.prog, fix=did_you_mean(name, known)
                )


def build_parser() -> Parser:
    """The parser of ``edgepipe`` with all subcommands."""
    parser = Parser(
        prog="edgepipe",
        description="Compile trained networks into bundles that run on the device by themselves.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgepipe {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS:
        module = import_module(f"edgepipe.cli.{name}")
        summary = (module.__doc__ or "").splitlines()[0].rstrip(".")
        sub = commands.add_parser(
            name,
            help=summary[0].lower() + summary[1:],
            description=summary + ".",
            epilog=getattr(module, "EPILOG", EXIT_CODES),
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        _add_common(sub)
        limits.add_arguments(sub)
        sub.set_defaults(execute=module.execute, parser=sub)
    return parser


def _add_common(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="results as JSON on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress, no summary")
    group.add_argument("--debug", action="store_true", help="a traceback with every error")


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parse ``arguments``. Raises UserError naming an unknown command or option."""
    command = arguments[0]
    if not command.startswith("-"):
        if command not in COMMANDS:
            raise UserError(
                f"unknown command '{command}'",
                where="edgepipe",
                fix=did_you_mean(command, COMMANDS),
            )
        choices = next(
            action.choices
            for action in parser._actions
            if isinstance(action, argparse._SubParsersAction)
        )
        choices[command].check_options(arguments[1:])
    else:
        parser.check_options(arguments[:1])
    return parser.parse_args(arguments)
