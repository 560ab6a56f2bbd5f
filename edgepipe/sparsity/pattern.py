"""Sparsity patterns: the part of a recipe behind ``+``.

``N:M`` keeps N of M neighbouring input channels, ``N:MvV`` the same ones for V neighbouring output
channels, ``S%`` prunes S per cent of a layer's weights wherever they are smallest, ``S%b1x4`` S per
cent of its blocks of four input channels. ``cS%`` removes S per cent of the channels themselves.
``autoS%`` chooses one of these for every layer, so that S per cent of the estimated time is saved.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgepipe.errors import UserError

#: What a pattern may look like, for messages.
KNOWN = (
    "N:M such as 2:4, N:MvV such as 1:4v32, S% such as 80%, S%b1x4 such as 80%b1x4, "
    "cS% such as c40%, auto or autoS% such as auto60%"
)
#: Largest M of N:M, and largest V.
LARGEST = 64

_GROUPED = re.compile(r"([1-9]\d*):([1-9]\d*)(?:v([1-9]\d*))?")
_SHARE = re.compile(r"(c?)([1-9]\d?(?:\.\d{1,2})?)%(b1x4)?")
_AUTO = re.compile(r"auto(?:([1-9]\d?(?:\.\d{1,2})?)%)?")
#: Per cent of the estimated time that ``auto`` saves.
SAVED = 50.0
#: Instead of a pattern where a network is trained on: what is zero stays zero.
KEPT = "kept"
#: Input channels of a block of ``b1x4``.
BLOCK = 4


@dataclass(frozen=True)
class Pattern:
    """``kept`` of ``of`` input channels, by groups of ``shared`` output channels; or, where ``of``
    is 0, ``percent`` of all weights pruned, by blocks of ``block`` input channels, or of all
    ``channels`` removed; ``auto``: of the estimated time saved.
    ``Pattern.parse(str(p)) == p``."""

    kept: int = 0
    of: int = 0
    shared: int = 1
    percent: float = 0.0
    block: int = 1
    channels: bool = False
    auto: bool = False

    @classmethod
    def parse(cls, text: str, where: str) -> Pattern:
        """Raises UserError naming ``where`` and what is known."""
        grouped, share = _GROUPED.fullmatch(text), _SHARE.fullmatch(text)
        if (saved := _AUTO.fullmatch(text)) is not None:
            return cls(percent=float(saved[1] or SAVED), auto=True)
        if share is not None and not (share[1] and share[3]):
            block = BLOCK if share[3] else 1
            return cls(percent=float(share[2]), block=block, channels=bool(share[1]))
        if grouped is None:
            raise UserError(f"unknown sparsity '+{text}'", where=where, fix=f"known: {KNOWN}")
        kept, of, shared = int(grouped[1]), int(grouped[2]), int(grouped[3] or 1)
        if not kept < of <= LARGEST or shared > LARGEST:
            raise UserError(
                f"sparsity '+{text}' keeps {kept} of {of} for {shared} channels",
                where=where,
                fix=f"N is below M, and neither M nor V is above {LARGEST}",
            )
        return cls(kept, of, shared)

    @property
    def density(self) -> float:
        """Share of the weights that stay."""
        return self.kept / self.of if self.of else 1 - self.percent / 100

    def __str__(self) -> str:
        if not self.of:
            share = "c" * self.channels + "auto" * self.auto + f"{self.percent:g}%"
            return share + (f"b1x{self.block}" if self.block > 1 else "")
        return f"{self.kept}:{self.of}" + (f"v{self.shared}" if self.shared > 1 else "")
