"""How a network is fine-tuned, as one immutable value that refuses impossible combinations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgepipe.errors import UserError, did_you_mean
from edgepipe.sparsity.pattern import KEPT, Pattern

SCHEDULES = ("cosine", "constant")
RANGES = ("learned", "average")
LOSSES = ("cross_entropy", "squared_error")
AUGMENTATIONS = ("none", "flip", "shift_flip")
PRUNINGS = ("gradual", "decay", "straight")
NORMALIZATIONS = ("none", "batch")
#: What ``sparsity`` by layer says of a layer without zeros.
DENSE = "dense"


@dataclass(frozen=True)
class FinetuneSettings:
    """How long, how fast and towards what. Raises UserError for values that cannot be.

    ``learning_rate``: what Adam moves a weight per step, as a share of the root mean square of
    its layer's weights; scales of quantized tensors move by the same share of themselves. So one
    rate fits layers, and networks, of any magnitude. ``schedule``: "cosine" falls to zero.
    ``ranges``: "learned" trains the step of every grid with the weights (LSQ); "average" lets
    activations follow moving averages of their extremes and leaves the steps of weights alone.
    ``loss``: "cross_entropy" between class labels and logits, or "squared_error" relative to
    the square of what is wanted. ``distillation``: share of the loss, 0…1, that compares with
    the float model instead of the labels; 1 needs no labels. ``temperature`` softens both sides
    of that comparison under cross entropy.
    ``augmentation``, of images [N, C, H, W]: "flip" mirrors half of them, "shift_flip" moves
    them by up to an eighth of their size too.
    ``sparsity``: a pattern as in a recipe ("80%", "2:4v8") that weights have in the end, reached as
    ``pruning`` says (see ``masks``); "kept" leaves zero what is zero. Or the pattern of each layer
    by its name, as ``prune.run`` finds it (``manifest["patterns"]``); others stay dense.
    ``normalization``, in float alone: "batch" normalizes what convolutions put out while they are
    trained and is part of their weights in the end (see ``normalization``).
    ``checkpoint``: folder that holds the state of the training, saved every
    ``checkpoint_seconds`` and at the end; a run with the same model, data and settings goes on
    there and ends with the same bits as one that was never interrupted.
    """

    epochs: int = 10
    batch: int = 64
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    ranges: str = "learned"
    loss: str = "cross_entropy"
    distillation: float = 0.0
    temperature: float = 2.0
    augmentation: str = "none"
    sparsity: str | Mapping[str, str] = ""
    pruning: str = "gradual"
    normalization: str = "none"
    seed: int = 0
    checkpoint: Path | None = None
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for field, known in (
            ("schedule", SCHEDULES),
            ("ranges", RANGES),
            ("loss", LOSSES),
            ("augmentation", AUGMENTATIONS),
            ("pruning", PRUNINGS),
            ("normalization", NORMALIZATIONS),
        ):
            if (value := getattr(self, field)) not in known:
                raise UserError(
                    f"unknown {field} '{value}'", where=field, fix=did_you_mean(value, known)
                )
        if not isinstance(self.sparsity, str):
            for name, text in self.sparsity.items():
                if text != DENSE:
                    _check_pattern(text, f"sparsity, layer '{name}'")
        elif self.sparsity not in ("", KEPT):
            _check_pattern(self.sparsity, "sparsity")
        for field, low, high in (
            ("epochs", 0, 10_000),
            ("batch", 1, 1 << 16),
            ("learning_rate", 1e-9, 1.0),
            ("distillation", 0.0, 1.0),
            ("temperature", 1e-2, 1e2),
            ("seed", 0, 2**63 - 1),
            ("checkpoint_seconds", 0.0, 1e6),
        ):
            if not low <= (number := getattr(self, field)) <= high:
                raise UserError(f"{field} {number} is outside {low:g}…{high:g}", where=field)


def _check_pattern(text: str, where: str) -> None:
    pattern = Pattern.parse(text, where)
    if pattern.channels or pattern.auto:
        raise UserError(
            f"no training reaches '{text}'",
            where=where,
            fix='prune first (edgepipe.prune.run), then train with sparsity "kept", or none '
            "where channels went",
        )
