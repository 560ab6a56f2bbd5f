"""Errors that a user sees as one line: what is wrong, where, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Longer lines keep their two ends: names in hostile files may have megabytes.
_MOST_CHARACTERS = 1000


def one_line(text: str) -> str:
    """``text`` as one line for a terminal: spaces for line ends, control and direction characters
    escaped, the middle left out where it is long."""
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class EdgepipeError(Exception):
    """Base of every error edgepipe raises on purpose. ``exit_code`` is the process exit code."""

    exit_code = 3


class UserError(EdgepipeError):
    """The user's input or environment is at fault (exit code 2).

    ``what`` says what is wrong, ``where`` names the file, tensor or option, ``fix`` says what
    would work. ``str()`` is always a single printable line.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}" if where else what
        if fix:
            text += f"; {fix}"
        super().__init__(one_line(text))


class Unsupported(UserError):
    """The model is valid but uses something edgepipe does not compile; names the op or feature."""


class ValidationFailed(EdgepipeError):
    """A bundle is below the accuracy floor (exit code 1)."""

    exit_code = 1


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return the ``fix`` text for a misspelt name: the closest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(names)
