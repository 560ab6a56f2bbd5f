"""The training loop: a float or a rounded network, labels or a float teacher, Adam.

Everything random is a function of the seed and the step's number, so the state of a training is
its parameters, the optimiser's moments and that number.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edgepipe.errors import UserError
from edgepipe.quantization.finetune import normalization
from edgepipe.quantization.finetune.checkpoint import Checkpoint
from edgepipe.quantization.finetune.examples import Examples, steps_per_epoch
from edgepipe.quantization.finetune.masks import Masks
from edgepipe.quantization.finetune.network import Network, tensor
from edgepipe.quantization.finetune.settings import FinetuneSettings

Progress = Callable[[str], None]


def train(
    network: Network,
    teacher: Network | None,
    examples: Examples,
    settings: FinetuneSettings,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> None:
    """Change ``network`` in place; goes on where ``checkpoint`` stopped.

    Raises UserError when the loss is no longer a number.
    """
    if settings.normalization == "batch":
        normalization.add(network, examples, settings)
    masks = Masks(network, settings) if settings.sparsity else None
    optimizer = torch.optim.Adam(_parameters(network, settings.learning_rate))
    step = 0
    state = checkpoint.load() if checkpoint is not None else None
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        progress(f"fine-tuning goes on at step {step}")
    per_epoch = steps_per_epoch(len(examples), settings)
    total = settings.epochs * per_epoch
    network.train()
    losses: list[float] = []
    while step < total:
        for group in optimizer.param_groups:
            group["lr"] = group["first_lr"] * share_of_rate(step / total, settings.schedule)
        if masks is not None:
            masks.update(step, total)
        losses.append(_step(network, teacher, optimizer, examples, step, settings))
        step += 1
        if step % per_epoch == 0:
            mean = sum(losses) / len(losses)
            progress(f"fine-tuning epoch {step // per_epoch} of {settings.epochs}: loss {mean:.4f}")
            losses.clear()
        if checkpoint is not None and (step == total or checkpoint.due()):
            checkpoint.save(
                step=step, network=network.state_dict(), optimizer=optimizer.state_dict()
            )
    if masks is not None:
        masks.update(total, total)
    network.eval()
    for layer in network.layers:
        normalization.fold(layer)


def share_of_rate(done: float, schedule: str) -> float:
    """Share of the learning rate after ``done`` (0…1) of all steps."""
    return 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0


def _parameters(network: Network, rate: float) -> list[dict[str, Any]]:
    """One group per tensor: weights and biases move in units of their own magnitude.

    A tensor of zeros has none, and takes that of its layer.
    """
    groups = []
    for layer in network.layers:
        named = layer.named_parameters()
        moved = {
            p: _magnitude(p)
            for name, p in named
            if p.requires_grad and not name.endswith("log_ratio")
        }
        largest = max(moved.values()) or 1.0
        groups += [{"params": [p], "first_lr": rate * (m or largest)} for p, m in moved.items()]
    steps = [p for name, p in network.named_parameters() if name.endswith("log_ratio")]
    if steps:
        groups.append({"params": steps, "first_lr": rate})
    return groups


def _magnitude(parameter: nn.Parameter) -> float:
    return float(parameter.detach().double().square().mean().sqrt())


def _step(
    network: Network,
    teacher: Network | None,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    step: int,
    settings: FinetuneSettings,
) -> float:
    arrays, labels = examples.batch(step, settings)
    inputs = {name: tensor(array) for name, array in arrays.items()}
    outputs = network(inputs)
    loss = outputs[0].new_zeros(())
    if labels is not None and settings.distillation < 1.0:
        wanted = torch.from_numpy(labels)
        loss = loss + (1.0 - settings.distillation) * _to_labels(outputs[0], wanted, settings)
    if teacher is not None:
        with torch.no_grad():
            taught = teacher(inputs)
        loss = loss + settings.distillation * _to_teacher(outputs, taught, settings)
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss is {float(loss.detach())} at step {step}",
            where="fine-tuning",
            fix=f"lower learning_rate, it is {settings.learning_rate:g}",
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _to_labels(
    output: torch.Tensor, wanted: torch.Tensor, settings: FinetuneSettings
) -> torch.Tensor:
    if settings.loss == "cross_entropy":
        return functional.cross_entropy(output, wanted)
    return _relative_error(output, wanted)


def _to_teacher(
    outputs: list[torch.Tensor], taught: list[torch.Tensor], settings: FinetuneSettings
) -> torch.Tensor:
    """Hinton et al. 2015 (arXiv 1503.02531) for logits; all outputs count for squared errors."""
    if settings.loss == "cross_entropy":
        soft = settings.temperature
        wanted = torch.softmax(taught[0] / soft, 1)
        found = torch.log_softmax(outputs[0] / soft, 1)
        return soft**2 * functional.kl_div(found, wanted, reduction="batchmean")
    pairs = zip(outputs, taught, strict=True)
    errors = [_relative_error(output, wanted) for output, wanted in pairs]
    return torch.stack(errors).mean()


def _relative_error(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    power = wanted.square().mean().clamp_min(1e-30)
    return (output - wanted).square().mean() / power
