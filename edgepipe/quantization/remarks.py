"""How the stages of quantization tell reasons and doubts."""

from __future__ import annotations

from typing import Protocol


class Note(Protocol):
    """Records ``text`` about ``subject``, a node or tensor name. ``doubt`` is what the user should
    hear of unasked: the model may be worse than it could be."""

    def __call__(self, subject: str | None, text: str, *, doubt: bool = False) -> None: ...
