"""Errors that a user sees as one line: what is wrong, where, and what would work."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgepipeError(Exception):
    """Base of every error edgepipe raises on purpose. ``exit_code`` is the process exit code."""

    exit_code = 3


class UserError(EdgepipeError):
    """The user's input or environment is at fault (exit code 2).

    ``what`` says what is wrong, ``where`` names the file, tensor or option, ``fix`` says what
    would work. ``str()`` is always a single line.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        text = f"{where}: {what}" if where else what
        if fix:
            text += f"; {fix}"
        super().__init__(" ".join(text.split()))


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
