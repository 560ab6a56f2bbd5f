"""Batch normalization while a float network is trained: it begins as identity and is folded away.

Networks come here with their BatchNorms folded. What pruning takes from a layer then moves and
shrinks everything behind it, and weights learn slowly what a mean and a variance would put right at
once (Ioffe and Szegedy 2015, arXiv 1502.03167). So the outputs of convolutions are normalized again
with scales and shifts that are trained, beginning with the deviations and means found there; in the
end running averages become part of weights and biases, and the graph is what it was.
"""

# mypy: allow-subclassing-any, disable-error-code="no-untyped-call,untyped-decorator"
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from edgepipe.errors import UserError
from edgepipe.quantization.finetune.examples import Examples, steps_per_epoch
from edgepipe.quantization.finetune.layer import TrainedLayer
from edgepipe.quantization.finetune.network import Network, tensor
from edgepipe.quantization.finetune.settings import FinetuneSettings

#: Share of a running average that a batch renews.
MOMENTUM = 0.05
#: What is added to a layer's variances, as a share of their mean.
EPSILON = 1e-5
#: Samples that the first means and variances are of, at least, in whole batches.
FIRST = 512
#: Statistics of fewer samples than this lead astray.
LEAST = 8


class Norm(nn.Module):
    """Normalizes [N, C, …] float32 over all but C; identity for batches of ``mean`` and
    ``variance`` [C] at first."""

    def __init__(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        super().__init__()
        self.epsilon = EPSILON * float(variance.mean()) or EPSILON
        self.register_buffer("mean", mean.clone())
        self.register_buffer("variance", variance.clone())
        self.scale = nn.Parameter((variance + self.epsilon).sqrt())
        self.shift = nn.Parameter(mean.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` by its own statistics in training, by running averages otherwise."""
        return functional.batch_norm(x, self.mean, self.variance, self.scale, self.shift,
                                     self.training, MOMENTUM, self.epsilon)  # fmt: skip

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What it multiplies by and then adds, [C] each, by running averages."""
        factor = self.scale / (self.variance + self.epsilon).sqrt()
        return factor, self.shift - self.mean * factor


@torch.no_grad()
def add(network: Network, examples: Examples, settings: FinetuneSettings) -> None:
    """Normalize what convolutions put out. Raises UserError for small batches."""
    size = min(settings.batch, len(examples))
    if size < LEAST:
        raise UserError(f"batches of {size} are too small", where="normalization",
                        fix=f"take {LEAST} samples or more, or normalization='none'")  # fmt: skip
    count = min(-(-FIRST // size), steps_per_epoch(len(examples), settings))
    means: dict[TrainedLayer, list[torch.Tensor]] = {}
    variances: dict[TrainedLayer, list[torch.Tensor]] = {}
    for step in range(count):
        arrays, _ = examples.batch(step, settings)
        values = {v: tensor(arrays[v.name]) for v in network.graph.inputs if v.name in arrays}
        network.trace(values)
        for layer in network.layers:
            if layer.layer.node.op_type == "Conv":
                x = values[layer.layer.node.outputs[0]].transpose(0, 1).flatten(1)
                means.setdefault(layer, []).append(x.mean(1))
                variances.setdefault(layer, []).append(x.var(1, unbiased=False))
    for layer, found in means.items():
        each = torch.stack(found)
        # Of all samples: within batches, and between them.
        variance = torch.stack(variances[layer]).mean(0) + each.var(0, unbiased=False)
        layer.norm = Norm(each.mean(0), variance)
        assert layer.bias is not None, "convolutions have one"
        layer.bias.requires_grad_(False)  # the mean takes it away again


@torch.no_grad()
def fold(layer: TrainedLayer) -> None:
    """Make the normalization of ``layer`` part of its weight and bias, if it has one."""
    if layer.norm is None:
        return
    factor, shift = layer.norm.factors()
    masked = hasattr(layer, "parametrizations")
    weight = layer.parametrizations.weight.original if masked else layer.weight
    weight.mul_(factor.reshape(-1, *[1] * (weight.ndim - 1)))
    assert layer.bias is not None, "convolutions have one"
    layer.bias.mul_(factor).add_(shift)
    layer.norm = None
