"""Prunes and trains in turn: a bit more at a time, until a recipe's zeros are reached.

Training does not give back in full what pruning in one go has taken. A step takes little, with data
(``prune.run``), and what is left is trained before the next one, as Han et al. 2015 (arXiv
1506.02626) do it by magnitudes: towards what the dense network puts out, without labels
(``distillation`` says why). Labels come last. With them from the beginning a network learns the few
images there are by heart before it has found again what pruning took, which the dense network had
from more of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe import prune
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.quantization.finetune import FinetuneSettings
from edgepipe.quantization.finetune import run as finetune
from edgepipe.sparsity.pattern import KEPT, Pattern

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.importer.source import Source
    from edgepipe.quantization.graph import Array

#: Of every step: the power of the density that it reaches, its share of the epochs, and that of the
#: learning rate.
STEPS = ((0.4, 0.1, 0.5), (0.65, 0.1, 0.5), (0.85, 0.12, 0.75), (1.0, 0.68, 1.0))
#: Share of all epochs that has labels, where there are any.
LABELLED = 0.25


@dataclass(frozen=True)
class Step:
    """A pattern on the way, and how long and how fast its network is trained."""

    pattern: Pattern
    epochs: int
    rate: float


def plan(pattern: Pattern, epochs: int) -> list[Step]:
    """The way to ``pattern`` in ``epochs``, the last step there; steps with one pattern are one.
    Channels go, and ``auto`` chooses, in one."""
    if pattern.channels or pattern.auto:
        return [Step(pattern, epochs, 1.0)]
    steps: list[Step] = []
    for power, share, rate in STEPS:
        density = pattern.density**power
        reached = replace(pattern, percent=round(100 * (1 - density), 2))
        if pattern.of:
            most = pattern.of - 1  # all of them would be no step
            kept = max(pattern.kept, min(most, round(pattern.of * density)))
            reached = replace(pattern, kept=kept)
        step = Step(reached, round(share * epochs), rate)
        if steps and steps[-1].pattern == reached:
            step = replace(step, epochs=steps.pop().epochs + step.epochs)
        steps.append(step)
    before = sum(step.epochs for step in steps[:-1])
    steps[-1] = Step(pattern, max(epochs - before, 0), steps[-1].rate)
    return steps


def run(
    graph: ir.Model,
    source: Source,
    data: tuple[Mapping[str, Array] | Array, Array | None],
    settings: FinetuneSettings,
    context: Context,
    teacher: ir.Model | None = None,
) -> tuple[ir.Model, prune.Pruned]:
    """A copy of ``graph``, the result of ``edgepipe.passes.run`` on ``source``, with the zeros of
    the context's recipe, trained; and what ``prune.run`` says of the last step.

    ``data``, ``settings`` and ``teacher`` are those of ``finetune.run``. Without labels all epochs
    are those of the steps. With them a quarter follows that learns labels and ``teacher``; the
    steps before it learn what ``graph`` puts out, whatever the loss. The first samples of the data
    prune. With ``settings.checkpoint`` every training has a folder in it, and an interrupted run
    goes on. Raises UserError as both do, where the recipe has no pattern, and for settings with
    another one.
    """
    recipe = context.recipe
    if recipe.sparsity is None or recipe.quantizes:
        raise UserError(
            f"recipe '{recipe}' has no zeros in float",
            where="recipe",
            fix="for example fp32+80%; quantize what it leads to",
        )
    if settings.sparsity not in ("", KEPT):
        raise UserError(
            f"sparsity is '{settings.sparsity}' there, and '{recipe.sparsity}' in the recipe",
            where="FinetuneSettings.sparsity",
            fix="leave it out: steps follow the recipe",
        )
    inputs, labels = data
    if not isinstance(inputs, Mapping):
        inputs = {value.name or "": inputs for value in graph.graph.inputs[:1]}
    samples = {name: array[: prune.MOST_SAMPLES] for name, array in inputs.items()}
    plain = replace(recipe.settings, distill=None)  # every step is trained as it is
    taught, model, facts = graph if teacher is None else teacher, graph, None
    settings = replace(settings, sparsity="" if recipe.sparsity.channels else KEPT)
    blind, towards, labelled = settings, taught, 0
    if labels is not None:
        blind, towards = replace(settings, loss="squared_error", distillation=1.0), graph
        labelled = round(settings.epochs * LABELLED)
    for number, step in enumerate(plan(recipe.sparsity, settings.epochs - labelled), 1):
        own = replace(context, recipe=replace(recipe, sparsity=step.pattern, settings=plain))
        context.progress(f"step {number}: {step.pattern}, {step.epochs} epochs")
        pruned, facts = prune.run(model, source, samples, own)
        rate = settings.learning_rate * step.rate
        changed = replace(apart(blind, f"step-{number}"), epochs=step.epochs, learning_rate=rate)
        model = finetune(pruned, None, (inputs, None), changed, own, towards)
    if labelled:
        context.progress(f"labels, {labelled} epochs")
        changed = replace(apart(settings, "labels"), epochs=labelled)
        model = finetune(model, None, data, changed, context, taught)
    assert facts is not None  # there is a pattern
    return model, facts


def apart(settings: FinetuneSettings, name: str) -> FinetuneSettings:
    """``settings`` with a folder of its own for the state of a training."""
    folder = settings.checkpoint
    return settings if folder is None else replace(settings, checkpoint=Path(folder) / name)
