"""Sparsity while a network is trained: which weights are zero, and when they become so.

A ``Mask`` is a parametrisation of a layer's weight, so training, rounding and result all see masked
weights. Three ways of getting there (``FinetuneSettings.pruning``):

``gradual``: the smallest weights go for good, a few at a time; the share that is pruned follows the
cubic schedule of Zhu and Gupta 2017 (arXiv 1710.01878). A pattern N:M goes from M-1:M to N:M.
``decay``: weights outside of the mask count for less and less until they count for nothing
(Bambhaniya et al. 2024, arXiv 2402.04744); until then the mask follows their magnitudes.
``straight``: dense weights are kept beside the mask, gradients pass straight through it to all of
them, and those outside decay (SR-STE; Zhou et al. 2021, arXiv 2102.04010).
"""

# mypy: allow-subclassing-any, disable-error-code="no-untyped-call,untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.nn.utils import parametrize

from edgepipe.errors import UserError
from edgepipe.quantization.finetune.layer import TrainedLayer
from edgepipe.quantization.finetune.network import Network
from edgepipe.quantization.finetune.settings import DENSE, FinetuneSettings
from edgepipe.quantization.layers import prunable
from edgepipe.sparsity import pruning
from edgepipe.sparsity.pattern import KEPT, Pattern

#: Share of all steps after which ``gradual`` and ``decay`` leave the mask alone, and the weights
#: that stay recover.
RAMP = 0.6
#: Steps between two looks at the magnitudes.
EVERY = 10
#: What SR-STE takes from a weight outside of the mask, per unit of gradient and of itself.
DECAY = 2e-4


class Mask(nn.Module):
    """Multiplies a weight by ``kept`` (0 or 1 each), or by ``passing`` where that is 0."""

    def __init__(self, kept: torch.Tensor, straight: bool) -> None:
        super().__init__()
        self.straight = straight
        self.register_buffer("kept", kept)
        self.register_buffer("passing", torch.zeros(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with zeros."""
        if self.straight:
            masked: torch.Tensor = _Straight.apply(weight, self.kept)
            return masked
        return weight * (self.kept + self.passing * (1 - self.kept))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(weight, kept)
        return weight * kept

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        weight, kept = context.saved_tensors
        return gradient + DECAY * (1 - kept) * weight, None


class Masks:
    """The masks of all layers that are pruned, moved by ``update`` once per step."""

    def __init__(self, network: Network, settings: FinetuneSettings) -> None:
        self.way = settings.pruning
        self.masks: list[tuple[TrainedLayer, Mask, Pattern | None]] = []
        patterns = wanted(network.graph, settings.sparsity)
        for layer in network.layers:
            if layer.layer.node in patterns:
                pattern = patterns[layer.layer.node]
                kept = (layer.weight.detach() != 0).float()
                if pattern is not None:
                    kept = torch.ones_like(kept)
                mask = Mask(kept, self.way == "straight" and pattern is not None)
                parametrize.register_parametrization(layer, "weight", mask)
                self.masks.append((layer, mask, pattern))
        if not self.masks:
            raise UserError(
                "no layer of the network can be pruned", where=f"sparsity '{settings.sparsity}'"
            )

    def update(self, step: int, total: int) -> None:
        """Move the masks to where they belong before step ``step`` of ``total``, from 0."""
        done = min(1.0, step / (RAMP * total)) if total else 1.0
        if (step % EVERY and step != total) or self._settled(step, total):
            return
        for layer, mask, pattern in self.masks:
            if pattern is None:
                continue
            weight = layer.parametrizations.weight.original.detach()
            if self.way == "gradual":  # what went stays away
                reached, weight = thinned(pattern, done), weight * mask.kept
            else:
                reached = pattern
            mask.kept.copy_(_kept(layer, weight, reached))
            mask.passing.fill_(1 - done if self.way == "decay" else 0.0)

    def _settled(self, step: int, total: int) -> bool:
        return self.way != "straight" and step - EVERY >= RAMP * total


def wanted(graph: ir.Graph, sparsity: str | Mapping[str, str]) -> dict[ir.Node, Pattern | None]:
    """The pattern of every layer that has one in the end; None where its zeros are to stay.

    Raises UserError for the name of a layer that sparse kernels do not run.
    """
    if sparsity == KEPT:
        return dict.fromkeys(prunable(graph, None))
    if isinstance(sparsity, str):
        pattern = Pattern.parse(sparsity, "FinetuneSettings.sparsity")
        return dict.fromkeys(prunable(graph, pattern), pattern)
    layers = {node.name: node for node in prunable(graph, None)}
    for name in sparsity:
        if name not in layers:
            known = ", ".join(str(layer) for layer in list(layers)[:4])
            raise UserError(
                f"'{name}' is no layer that can be pruned",
                where="FinetuneSettings.sparsity",
                fix=f"there are {len(layers)}: {known}{', …' if len(layers) > 4 else ''}",
            )
    return {
        layers[name]: Pattern.parse(text, f"FinetuneSettings.sparsity, layer '{name}'")
        for name, text in sparsity.items()
        if text != DENSE
    }


def thinned(pattern: Pattern, done: float) -> Pattern:
    """What ``gradual`` has reached after the share ``done`` (0…1) of its way."""
    left = (1 - done) ** 3
    if pattern.of:
        steps = pattern.of - pattern.kept
        return replace(pattern, kept=pattern.kept + int(np.ceil(steps * left - 1e-9)))
    return replace(pattern, percent=pattern.percent * (1 - left))


def _kept(layer: TrainedLayer, weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The mask by magnitude, in the layout of ``weight``."""
    if pattern.of == pattern.kept and pattern.percent == 0:
        return torch.ones_like(weight)
    view = layer.layer
    matrix = view.matrix(weight.numpy())[0].astype(np.float64) ** 2
    taps = int(np.prod(view.weight_shape[2:]))
    kept = pruning.mask(matrix.reshape(view.outputs, -1, taps), pattern)
    return torch.tensor(view.restore(kept.reshape(matrix.shape).astype(np.float32)))
