"""Prunes and trains in turn: a bit more at a time, until a recipe's zeros are reached.

Training does not give back in full what pruning in one go has taken. A step takes little, with data
(``prune.run``), and what is left is trained (``finetune.run``) before the next one, as Han et al.
2015 (arXiv 1506.02626) do it by magnitudes.
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


@dataclass(frozen=True)
class Step:
    """A pattern on the way, and how long and how fast its network is trained."""

    pattern: Pattern
    epochs: int
    rate: float


def plan(pattern: Pattern, epochs: int) -> list[Step]:
    """The way to ``pattern`` in ``epochs``, the last step there; steps with one pattern are one.

    Raises UserError for channels and ``auto``, which have no way.
    """
    if pattern.channels or pattern.auto:
        raise UserError(
            f"no steps lead to '{pattern}'",
            where="sparsity",
            fix="prune in one go (edgepipe.prune.run), then train what is left",
        )
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


def samples_of(graph: ir.Model, inputs: Mapping[str, Array] | Array) -> dict[str, Array]:
    """What prunes of what trains: the first samples, by the names of the inputs."""
    if not isinstance(inputs, Mapping):
        inputs = {value.name or "": inputs for value in graph.graph.inputs[:1]}
    return {name: array[: prune.MOST_SAMPLES] for name, array in inputs.items()}


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

    ``data``, ``settings`` and ``teacher`` are those of ``finetune.run``; the epochs are those of
    all steps together. The first samples of the data prune. With ``settings.checkpoint`` every
    step has a folder in it, and an interrupted run goes on. Raises UserError as both do, where the
    recipe has no pattern, and for settings with another one.
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
    samples = samples_of(graph, data[0])
    taught, model, facts = graph if teacher is None else teacher, graph, None
    for number, step in enumerate(plan(recipe.sparsity, settings.epochs), 1):
        plain = replace(recipe.settings, distill=None)  # every step is trained as it is
        own = replace(context, recipe=replace(recipe, sparsity=step.pattern, settings=plain))
        context.progress(f"step {number}: {step.pattern}, {step.epochs} epochs")
        pruned, facts = prune.run(model, source, samples, own)
        folder = settings.checkpoint
        changed = replace(
            settings,
            sparsity=KEPT,
            epochs=step.epochs,
            learning_rate=settings.learning_rate * step.rate,
            checkpoint=None if folder is None else Path(folder) / f"step-{number}",
        )
        model = finetune(pruned, None, data, changed, own, taught)
    assert facts is not None  # there is a pattern
    return model, facts
