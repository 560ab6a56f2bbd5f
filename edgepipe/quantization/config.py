"""What to quantize and how, as one immutable value that refuses impossible combinations."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from edgepipe import patterns
from edgepipe.errors import UserError, did_you_mean
from edgepipe.quantization.scales import CodeRange

OBSERVERS = ("minmax", "average", "percentile", "mse", "entropy")
#: Methods that change the float graph first, in this order.
PREPARATIONS = ("smoothquant", "equalization")
#: Methods that set weights and biases, of which one is chosen.
FITS = (
    "bias_correction", "mean_variance", "gptq", "adaround", "adaquant", "reconstruction", "nncf",
)  # fmt: skip
#: Of those, the ones that know weights alone.
WEIGHT_ONLY_FITS = ("bias_correction", "gptq", "reconstruction")
METHODS = PREPARATIONS + FITS
#: Largest magnitudes of 8-bit weight codes that kernels are written for.
WEIGHT_LIMITS = (63, 127)
FIRST_LAST = ("same", "w8", "float")
DEPTHWISE = ("same", "w8")
#: Largest sensible group: beyond it a group is a whole row of any edge network.
MAX_GROUP = 1024


@dataclass(frozen=True)
class Format:
    """Bits of a node's weights and of the tensor it writes; ``None`` activations stay float.
    ``weight_limit``: largest magnitude of a code of 8 bits."""

    weight_bits: int
    activation_bits: int | None
    weight_limit: int = 127

    @property
    def span(self) -> CodeRange:
        """The codes its weights may have."""
        return CodeRange.of(self.weight_bits, self.weight_limit)

    @classmethod
    def parse(cls, text: str, where: str) -> Format | None:
        """``w8a8``, ``w4a8``, ``w4a4``, ``w8a16`` (float activations); ``float`` gives None."""
        if text == "float":
            return None
        found = re.fullmatch(r"w([48])a(4|8|16)", text)
        if found is None:
            raise UserError(
                f"unknown format '{text}'", where=where, fix="known: float, w8a8, w4a8, w4a4, w8a16"
            )
        activations = int(found[2])
        return cls(int(found[1]), None if activations == 16 else activations)


@dataclass(frozen=True)
class QuantConfig:
    """How a network is quantized. Raises UserError for values that cannot be.

    ``weight_bits``: 8 or 4, symmetric per output channel, or per group of ``group_size`` input
    channels where that is given (weight-only: activations stay float).
    ``weight_limit``: largest magnitude of an 8-bit weight code. 63 keeps weights in 7 bits, which
    some instructions need to be exact (``Target.integer``); 4-bit weights are unaffected, and so
    are the first and last layers that 4-bit recipes give 8 bits.
    ``activation_bits``: 8, 4, or None for weight-only. Asymmetric uint8 (``signed_activations``:
    int8), per tensor. ``symmetric_activations`` fixes the zero point to the middle of the range
    wherever a tensor has negative values.
    ``observer``: how ranges follow from the samples; ``percentile`` belongs to that observer.
    ``methods``: subset of PREPARATIONS and one of FITS at most, in any order. Without a fit,
    weights are rounded onto the scale of least squared error.
    ``overrides``: (regular expression, format) pairs; the first that matches a node's whole name
    or its op type wins. ``first_last``: "same" as the others, "w8" or "float"; ``depthwise``
    convolutions: "same" or "w8".
    ``fuse_residual``: an Add that follows a linear operator is computed on its accumulator, with
    no rounding in between. ``quantize_outputs``: also round tensors that only float operators or
    the caller read; otherwise those come straight from the accumulator.
    ``max_samples`` and ``memory_bytes`` bound what calibration keeps.
    """

    weight_bits: int = 8
    weight_limit: int = 127
    activation_bits: int | None = 8
    group_size: int | None = None
    observer: str = "mse"
    percentile: float = 99.99
    symmetric_activations: bool = False
    signed_activations: bool = False
    methods: tuple[str, ...] = ("reconstruction",)
    overrides: tuple[tuple[str, str], ...] = ()
    first_last: str = "same"
    depthwise: str = "same"
    fuse_residual: bool = True
    quantize_outputs: bool = False
    max_samples: int = 512
    memory_bytes: int = 768 << 20

    def __post_init__(self) -> None:
        _one_of("weight_bits", self.weight_bits, (4, 8))
        _one_of("weight_limit", self.weight_limit, WEIGHT_LIMITS)
        _one_of("activation_bits", self.activation_bits, (4, 8, None))
        _one_of("observer", self.observer, OBSERVERS)
        _one_of("first_last", self.first_last, FIRST_LAST)
        _one_of("depthwise", self.depthwise, DEPTHWISE)
        for method in self.methods:
            _one_of("methods", method, METHODS)
        exclusive = sorted(set(FITS) & set(self.methods))
        if len(exclusive) > 1:
            raise UserError(
                f"methods {' and '.join(exclusive)} each set weights and biases",
                where="methods",
                fix="choose one; 'smoothquant' and 'equalization' combine with any",
            )
        if self.activation_bits is None and self.fit not in (None, *WEIGHT_ONLY_FITS):
            raise UserError(
                f"method '{self.fit}' does not know float activations",
                where="methods",
                fix="for weights alone choose " + ", ".join(WEIGHT_ONLY_FITS),
            )
        if self.fit == "nncf" and self.weight_bits != 8:
            raise UserError(
                "method 'nncf' quantizes to 8 bits",
                where="methods",
                fix="choose 'reconstruction' for 4 bits",
            )
        if self.group_size is not None:
            if not 2 <= self.group_size <= MAX_GROUP:
                raise UserError(
                    f"group_size {self.group_size} is outside 2…{MAX_GROUP}", where="group_size"
                )
            if self.activation_bits is not None:
                raise UserError(
                    "groups share no scale along the reduction, so integers cannot accumulate",
                    where="group_size",
                    fix="use activation_bits=None (weight-only)",
                )
        if not 50.0 < self.percentile <= 100.0:
            raise UserError(f"percentile {self.percentile} is outside 50…100", where="percentile")
        if self.max_samples < 1 or self.memory_bytes < 1 << 20:
            raise UserError(
                "max_samples must be at least 1 and memory_bytes 1 MiB", where="calibration"
            )
        for pattern, text in self.overrides:
            patterns.check(pattern, "overrides")
            Format.parse(text, f"override '{pattern}'")

    @classmethod
    def parse(cls, text: str, **changes: object) -> QuantConfig:
        """From a recipe's name: ``w8a8``, ``w4a8``, ``w4a4``, ``w8a16``, ``w4g32``, …

        ``changes`` are further fields. Raises UserError naming what is known.
        """
        if found := re.fullmatch(r"w([48])g(\d+)", text):
            bits = int(found[1])
            base = cls(
                weight_bits=bits,
                activation_bits=None,
                group_size=int(found[2]),
                first_last=_small_layers(bits),
                depthwise=_small_layers(bits),
            )
        else:
            format = Format.parse(text, "recipe")
            if format is None:
                raise UserError("'float' is no quantized recipe", where="recipe")
            bits = format.weight_bits
            base = cls(
                weight_bits=bits,
                activation_bits=format.activation_bits,
                first_last=_small_layers(bits),
                depthwise=_small_layers(bits),
                methods=_methods(bits, format.activation_bits),
            )
        return replace(base, **changes)  # type: ignore[arg-type]

    @property
    def fit(self) -> str | None:
        """The method that sets weights and biases; None rounds them."""
        return next((method for method in self.methods if method in FITS), None)

    @property
    def format(self) -> Format:
        """What nodes have that no override names."""
        return Format(self.weight_bits, self.activation_bits, self.weight_limit)

    def override_of(self, name: str, op_type: str) -> tuple[str, str] | None:
        """The first override that matches a node."""
        for pattern, text in self.overrides:
            if patterns.fits(pattern, name) or patterns.fits(pattern, op_type):
                return pattern, text
        return None

    def format_of(self, name: str, op_type: str) -> Format | None:
        """The format of one node by the first matching override; None keeps it float."""
        found = self.override_of(name, op_type)
        if found is None:
            return self.format
        format = Format.parse(found[1], f"override '{found[0]}'")
        return format and replace(format, weight_limit=self.weight_limit)


def _small_layers(weight_bits: int) -> str:
    """First, last and depthwise layers of a recipe have few weights. What the first one loses to 4
    bits no later layer can win back (1.8 dB at the output of an 8-layer ResNet), and depthwise ones
    hold 2 % of MobileNetV2 and cost it 1 to 2 points of likeness to the float network (measured).
    """
    return "w8" if weight_bits == 4 else "same"


def _methods(weight_bits: int, activation_bits: int | None) -> tuple[str, ...]:
    """Equal channels cost weights what they save activations: good at w4a4 (1.4 points of top-1 on
    an 8-layer ResNet) and at w8a8 (0.3 to 0.6 dB at the output of three ResNets), bad at w4a8
    (-0.5 dB)."""
    equal = activation_bits == 4 or (weight_bits, activation_bits) == (8, 8)
    return ("equalization", "reconstruction") if equal else ("reconstruction",)


def _one_of(field: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        names = [str(k) for k in known]
        raise UserError(
            f"unknown {field} '{value}'", where=field, fix=did_you_mean(str(value), names)
        )
