"""Regular expressions that come with recipes: checked, and matched within a limit of time."""

from __future__ import annotations

import regex

from edgepipe.errors import UserError

#: Names have some hundred characters at most; an expression that needs longer than this for one
#: would not come to an end.
_LIMIT_S = 1.0
_MOST_CHARACTERS = 1000


def check(pattern: str, where: str) -> None:
    """Raises UserError naming ``where`` when ``pattern`` is no regular expression, or huge."""
    if len(pattern) > _MOST_CHARACTERS:
        raise UserError(f"an expression of {len(pattern)} characters", where=where,
                        fix=f"at most {_MOST_CHARACTERS}")  # fmt: skip
    try:
        regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError) as error:
        raise UserError(f"'{pattern}' is no regular expression: {error}", where=where) from None


def fits(pattern: str, text: str) -> bool:
    """Whether ``pattern`` matches all of ``text``. Raises UserError where that takes too long."""
    try:
        return regex.fullmatch(pattern, text, timeout=_LIMIT_S) is not None
    except TimeoutError:
        raise UserError(
            f"'{pattern}' takes longer than {_LIMIT_S:g} s on '{text}'",
            where="override",
            fix="repetitions in repetitions, (a+)+, do that",
        ) from None
