"""Recipes: how numbers are stored and computed, as one line of text and back."""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.errors import UserError, did_you_mean

#: Formats this version can lower. Others are added together with their kernels.
FORMATS = ("fp32",)


@dataclass(frozen=True)
class Recipe:
    """A number format. ``Recipe.parse(str(r)) == r`` for every recipe."""

    format: str = "fp32"

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Parse ``text``; raises UserError naming what is known."""
        if text not in FORMATS:
            raise UserError(
                f"unknown recipe '{text}'", where="--recipe", fix=did_you_mean(text, FORMATS)
            )
        return cls(text)

    def __str__(self) -> str:
        return self.format
