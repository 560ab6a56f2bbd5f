"""Recipes: how numbers are stored and computed, as one line of text or a small file.

The line is ``fp32``, ``fp16``, ``wBaA`` (weights of B bits, activations of A; 16 keeps them
float) or ``wBgN`` (weights of B bits with a scale per group of N inputs, activations float).
``fp32`` takes a sparsity behind a ``+``, ``fp32+2:4v32``, formats of integer activations one by
blocks, ``w8a8+80%b1x4`` (see ``edgepipe.sparsity.pattern``).
A file says the same as ``format`` and may change what the format leaves to a default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgepipe import patterns, tables
from edgepipe.errors import UserError, did_you_mean
from edgepipe.sparsity.pattern import Pattern

#: Formats without a parameter; ``wBgN`` comes on top.
FORMATS = ("fp32", "fp16", "w8a8", "w4a8", "w4a4", "w8a16", "w4a16")
GROUPED = ("w8gN", "w4gN")
#: Smallest and largest N of ``wBgN``.
GROUP_SIZES = (2, 1024)
#: How amounts of zeros follow from the one that is asked for, and what a search spends.
AMOUNTS = ("uniform", "erk", "search")
BUDGETS = ("macs", "bytes", "latency")
#: Fewest and most epochs of ``distill``.
EPOCHS = (1, 10_000)
#: Override that leaves a node as it is in the float model.
FLOAT = "float"

_WIDTHS = re.compile(r"w([48])(?:a(4|8|16)|g([1-9]\d*))")


@dataclass(frozen=True)
class Override:
    """Nodes whose whole name or operator type ``match`` (a regular expression) fits have
    ``format``: one of FORMATS with the arithmetic of the recipe, or "float"."""

    match: str
    format: str


@dataclass(frozen=True)
class Settings:
    """What a recipe file says beyond the format; None leaves the format's default.

    The fields mean what they mean in ``edgepipe.quantization.QuantConfig``; ``activations`` is
    "symmetric" or "asymmetric". ``amounts`` (of AMOUNTS) of a sparsity ``S%``: the same in every
    layer, by the shapes of layers, or searched within what ``budget`` (of BUDGETS) uniform ones
    take. ``distill``: epochs in which what a sparsity leaves is trained on the calibration data,
    without labels, towards what the dense network computes.
    """

    overrides: tuple[Override, ...] = ()
    first_last: str | None = None
    depthwise: str | None = None
    observer: str | None = None
    percentile: float | None = None
    methods: tuple[str, ...] | None = None
    activations: str | None = None
    max_samples: int | None = None
    allow_float_fallback: bool = False
    amounts: str | None = None
    budget: str | None = None
    distill: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as ``from_json`` takes them."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        found = {f.name: plain[f.name] for f in fields(self) if plain[f.name] != f.default}
        if self.overrides:
            found["overrides"] = [vars(override) for override in self.overrides]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Settings:
        """Check and take a table's keys. Raises UserError naming ``where`` and the key."""
        values: dict[str, Any] = {}
        for key, value in raw.items():
            if key not in _TYPES:
                raise UserError(f"unknown key '{key}'", where=where, fix=did_you_mean(key, _TYPES))
            kinds, said = _TYPES[key]
            if not isinstance(value, kinds) or isinstance(value, bool) is not (kinds is bool):
                raise UserError(f"'{key}' must be {said}", where=where)
            values[key] = value
        if "methods" in values:
            if not all(isinstance(name, str) for name in values["methods"]):
                raise UserError("'methods' must be a list of names", where=where)
            values["methods"] = tuple(values["methods"])
        if values.get("activations", "symmetric") not in ("symmetric", "asymmetric"):
            raise UserError(
                f"unknown activations '{values['activations']}'",
                where=where,
                fix="known: symmetric, asymmetric",
            )
        entries = enumerate(values.get("overrides", ()), 1)
        values["overrides"] = tuple(
            _override(entry, f"{where}, override {i}") for i, entry in entries
        )
        return cls(**values)


_TYPES: dict[str, tuple[Any, str]] = {
    "overrides": (list, "a list of tables {match = …, format = …}"),
    "first_last": (str, "a string"),
    "depthwise": (str, "a string"),
    "observer": (str, "a string"),
    "percentile": ((int, float), "a number"),
    "methods": (list, "a list of names"),
    "activations": (str, '"symmetric" or "asymmetric"'),
    "max_samples": (int, "a whole number"),
    "allow_float_fallback": (bool, "true or false"),
    "amounts": (str, "a string"),
    "budget": (str, "a string"),
    "distill": (int, "a whole number"),
}


@dataclass(frozen=True)
class Recipe:
    """A number format and what a file adds. ``Recipe.parse(str(r)) == r`` for every recipe
    without settings; with them ``Recipe.read(str(r), r.settings.to_json()) == r``."""

    format: str = "fp32"
    settings: Settings = field(default_factory=Settings)
    sparsity: Pattern | None = None

    def __post_init__(self) -> None:
        _check_format(self.format, "--recipe")
        self._check_sparsity()
        for override in self.settings.overrides:
            self._check_override(override)
        self._check_amounts()
        self._check_distill()
        plain = replace(self.settings, amounts=None, budget=None, distill=None)
        if plain != Settings() and not self.quantizes:
            raise UserError(
                f"{self.format} has no further settings",
                where="recipe file",
                fix="they belong to quantized formats",
            )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Parse a line; raises UserError naming what is known."""
        return cls._of(text, Settings(), "--recipe")

    @classmethod
    def read(cls, line: str, settings: Mapping[str, Any]) -> Recipe:
        """A recipe from its line and ``Settings.to_json()``. Raises UserError."""
        return cls._of(line, Settings.from_json(settings, "recipe settings"), "recipe")

    @classmethod
    def load(cls, text: str) -> Recipe:
        """A line, or the path of a ``.toml`` file. Raises UserError."""
        if Path(text).suffix != ".toml":
            return cls.parse(text)
        path = Path(text)
        if not path.is_file():
            raise UserError("no such recipe file", where=text)
        raw = tables.load_toml(path)
        line = raw.pop("format", None)
        if not isinstance(line, str):
            raise UserError("'format' is missing", where=text, fix='for example: format = "w8a8"')
        return cls._of(line, Settings.from_json(raw, text), text)

    @classmethod
    def _of(cls, line: str, settings: Settings, where: str) -> Recipe:
        format, plus, sparsity = line.partition("+")
        _check_format(format, where)
        return cls(format, settings, Pattern.parse(sparsity, where) if plus else None)

    @property
    def quantizes(self) -> bool:
        """Whether weights become integers."""
        return self.format.startswith("w")

    @property
    def changes_weights(self) -> bool:
        """Whether the bundle computes another model than the one that was given."""
        return self.quantizes or self.sparsity is not None

    @property
    def integer(self) -> bool:
        """Whether activations become integers too, so that kernels compute in them."""
        return self.quantizes and self._widths[1] in ("4", "8")

    @property
    def weight_bits(self) -> int | None:
        """8 or 4; None for a float format."""
        return int(self._widths[0]) if self.quantizes else None

    @property
    def activation_bits(self) -> int | None:
        """8 or 4; None where activations stay float."""
        return int(self._widths[1] or 0) if self.integer else None

    @property
    def group_size(self) -> int | None:
        """N of ``wBgN``."""
        return int(self._widths[2]) if self.quantizes and self._widths[2] else None

    @property
    def family(self) -> str:
        """The format with its group size left open: ``w4gN`` for ``w4g32``."""
        return self.format if self.group_size is None else f"w{self.weight_bits}gN"

    @property
    def _widths(self) -> tuple[str, str | None, str | None]:
        found = _WIDTHS.fullmatch(self.format)
        assert found is not None
        return found[1], found[2], found[3]

    def _check_sparsity(self) -> None:
        """Integer kernels run over blocks, those of float32 over any pattern, and all over fewer
        channels."""
        if self.sparsity is None or self.sparsity.channels or self.format == "fp32":
            return
        if not self.integer:
            raise UserError(
                f"recipe '{self}': no kernel runs sparse {self.format} weights",
                where="--recipe",
                fix=f"use fp32+{self.sparsity}, or leave '+{self.sparsity}' out",
            )
        if self.sparsity.block == 1:
            share = f"{100 * (1 - self.sparsity.density):g}"
            raise UserError(
                f"recipe '{self}': integer kernels run over blocks of four input channels",
                where="--recipe",
                fix=f"use {self.format}+{share}%b1x4, or fp32+{self.sparsity}",
            )

    def _check_amounts(self) -> None:
        """Amounts by layer are of patterns that have them, and a budget is what a search has."""
        settings, sparsity = self.settings, self.sparsity
        for key, value, known in (
            ("amounts", settings.amounts, AMOUNTS), ("budget", settings.budget, BUDGETS)
        ):  # fmt: skip
            if value is not None and value not in known:
                raise UserError(
                    f"unknown {key} '{value}'", where="recipe file", fix=did_you_mean(value, known)
                )
        shares = sparsity is not None and not (sparsity.of or sparsity.channels or sparsity.auto)
        if settings.amounts is not None and not shares:
            raise UserError(
                f"'amounts' are of patterns S% and S%b1x4, not of {self}", where="recipe file",
                fix="for example format = \"fp32+80%\"",
            )  # fmt: skip
        if settings.budget is not None and settings.amounts != "search":
            raise UserError(
                "a budget is what a search spends", where="recipe file",
                fix='set amounts = "search" too',
            )  # fmt: skip
        if settings.budget == "latency" and self.format != "fp32":
            raise UserError(
                f"latency is estimated for fp32, not {self.format}", where="recipe file",
                fix='use budget = "macs" or "bytes"',
            )  # fmt: skip

    def _check_distill(self) -> None:
        """Epochs are of what is pruned."""
        epochs = self.settings.distill
        if epochs is None:
            return
        if self.sparsity is None:
            raise UserError(
                f"'distill' trains what is pruned, and {self} prunes nothing", where="recipe file",
                fix='for example format = "fp32+2:4"',
            )  # fmt: skip
        low, high = EPOCHS
        if not low <= epochs <= high:
            raise UserError(f"distill {epochs} is outside {low}…{high}", where="recipe file")

    def _check_override(self, override: Override) -> None:
        """An override may change bits, not whether activations are integers."""
        if override.format == FLOAT:
            return
        wanted = Recipe(override.format)
        if not wanted.quantizes or wanted.integer != self.integer or wanted.group_size:
            same = [f for f in FORMATS if f[0] == "w" and Recipe(f).integer == self.integer]
            raise UserError(
                f"'{override.format}' does not combine with {self.format}",
                where=f"override '{override.match}'",
                fix="known: " + ", ".join([FLOAT, *same]),
            )

    def __str__(self) -> str:
        return self.format if self.sparsity is None else f"{self.format}+{self.sparsity}"


def _check_format(text: str, where: str) -> None:
    if text in FORMATS:
        return
    found = _WIDTHS.fullmatch(text)
    if found is None or found[3] is None:
        known = (*FORMATS, *GROUPED)
        raise UserError(f"unknown recipe '{text}'", where=where, fix=did_you_mean(text, known))
    low, high = GROUP_SIZES
    if not low <= int(found[3]) <= high:
        raise UserError(
            f"recipe '{text}': groups of {found[3]}", where=where, fix=f"N is {low}…{high}"
        )


def _override(entry: Any, where: str) -> Override:
    texts = isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values())
    if not texts or set(entry) != {"match", "format"}:
        raise UserError(
            "it must have the strings 'match' and 'format', and nothing else",
            where=where,
            fix='for example {match = "conv1", format = "w8a8"}',
        )
    override = Override(entry["match"], entry["format"])
    patterns.check(override.match, where)
    if override.format != FLOAT:
        _check_format(override.format, where)
    return override
