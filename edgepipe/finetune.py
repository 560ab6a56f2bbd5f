"""A dense network goes in; one with the zeros and the bits of a recipe comes out, trained.

Three trainings on the same data, each of them there for itself too: the dense network, which is the
teacher of the others (``quantization.finetune``); what pruning leaves of the network as it came, or
of the teacher (``sparse``); and that, or else the teacher, rounded as it will be executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe import importer, passes, prune, quantize
from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.quantization.finetune import FinetuneSettings
from edgepipe.quantization.finetune import run as train
from edgepipe.recipe import Recipe, Settings
from edgepipe.sparsity.pattern import KEPT
from edgepipe.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.importer.source import Source
    from edgepipe.quantization.graph import Array

#: What works for image classifiers; see docs/finetuning.md.
SETTINGS = FinetuneSettings(
    epochs=40, batch=32, learning_rate=8e-3, distillation=0.5, normalization="batch"
)
#: Of the integers: the share of the learning rate, and of the epochs.
SLOWER, SHORTER = 0.25, 0.25
#: Epochs of a sparse network that have labels, where it is not said.
LABELLED = 10


@dataclass(frozen=True)
class Tuned:
    """``model``: float, or a Q/DQ graph where the recipe quantizes; ``teacher``: the dense network,
    fine-tuned, in float; ``pruned``: what ``prune.run`` says of the zeros, None without any."""

    model: ir.Model
    teacher: ir.Model
    pruned: prune.Pruned | None


def run(
    model: str | Path,
    recipe: str | Recipe,
    data: tuple[Mapping[str, Array] | Array, Array | None],
    settings: FinetuneSettings = SETTINGS,
    *,
    target: str | Target = "host",
    teacher: ir.Model | None = None,
    labelled: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Fine-tune ``model`` (what ``edgepipe compile`` takes: a file, ``package.module:factory`` of a
    torch module, a zoo name) to ``recipe`` for ``target``, which says how integers are.

    ``data`` is that of ``quantization.finetune.run``, and so are ``settings``, for every training;
    integers take a quarter of the epochs, of the rate, and no normalization. ``teacher``: an
    earlier run's, which saves training it again. ``labelled`` is that of ``sparse``; 0 prunes the
    teacher, which has learned the labels, and not the network as it came. With
    ``settings.checkpoint`` every training has a folder in it, and an interrupted run goes on.
    Raises UserError for a recipe that changes nothing, and what its parts raise.
    """
    recipe = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    target = Target.load(target) if isinstance(target, str) else target
    if recipe.sparsity is None and not recipe.quantizes:
        raise UserError(f"'{recipe}' is the network as it is", where="recipe",
                        fix="for example w4a8, fp32+80% or w8a8+80%b1x4")  # fmt: skip
    config = quantize.configure(recipe, target)
    if config is not None and config.activation_bits is None:
        raise UserError(f"of '{recipe}' weights alone are rounded, which is not trained",
                        where="recipe", fix="use w8a8 or w4a8")  # fmt: skip
    labelled = _labelled(labelled, settings)
    own = Settings(amounts=recipe.settings.amounts, budget=recipe.settings.budget)
    floats = replace(recipe, format="fp32", settings=own)
    context = Context(target, floats, progress=progress)
    source = importer.load(model)
    graph = passes.run(source.model, context)
    if teacher is None and settings.distillation < 1.0:
        progress("training the dense network")
        plain = replace(settings, distillation=0.0, sparsity="")
        teacher = train(graph, None, data, apart(plain, "teacher"), context)
    elif teacher is None:  # without labels the network itself is all there is to learn from
        teacher = graph
    result, pruned = teacher, None
    if recipe.sparsity is not None:
        begun = graph if labelled else teacher
        result, pruned = sparse(
            begun, source, data, apart(settings, "sparse"), context, teacher, labelled
        )
    if config is not None:
        progress("training what is rounded")
        rounded = replace(
            settings,
            sparsity=KEPT if recipe.sparsity is not None and not recipe.sparsity.channels else "",
            normalization="none",
            epochs=round(settings.epochs * SHORTER),
            learning_rate=settings.learning_rate * SLOWER,
        )
        result = train(result, config, data, apart(rounded, "integers"), context, teacher)
    return Tuned(result, teacher, pruned)


def sparse(
    graph: ir.Model,
    source: Source,
    data: tuple[Mapping[str, Array] | Array, Array | None],
    settings: FinetuneSettings,
    context: Context,
    teacher: ir.Model | None = None,
    labelled: int | None = None,
) -> tuple[ir.Model, prune.Pruned]:
    """A copy of ``graph``, the result of ``edgepipe.passes.run`` on ``source``, fine-tuned or not,
    pruned as the context's recipe says and trained; and what ``prune.run`` says of it.

    ``data``, ``settings`` and ``teacher`` are those of ``quantization.finetune.run``; the first
    samples prune. Labels come last: until the last ``labelled`` epochs, by default ten, or half
    where there are fewer than twenty, it learns what ``graph`` puts out, whatever the loss, and
    then labels and ``teacher``. With labels from the beginning a network learns the few images
    there are by heart before it has found again what pruning took, which the dense network had
    from more of them. With none labelled, ``graph`` is one that was fine-tuned: it knows the labels
    and teaches itself. That ends higher for networks with weights to spare, labels last for small
    ones. Where ``data`` has no labels all epochs are as ``settings`` says. With
    ``settings.checkpoint`` either training has a folder in it, and an interrupted run goes on.
    Raises UserError as both do, where the recipe has no pattern, for settings with another one, and
    for more epochs with labels than there are.
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
            fix="leave it out: the recipe says it",
        )
    labelled = _labelled(labelled, settings)
    inputs, labels = data
    if not isinstance(inputs, Mapping):
        inputs = {value.name or "": inputs for value in graph.graph.inputs[:1]}
    samples = {name: array[: prune.MOST_SAMPLES] for name, array in inputs.items()}
    plain = replace(recipe, settings=replace(recipe.settings, distill=None))  # trained here
    model, facts = prune.run(graph, source, samples, replace(context, recipe=plain))
    assert facts is not None  # there is a pattern
    settings = replace(settings, sparsity="" if recipe.sparsity.channels else KEPT)
    taught = graph if teacher is None else teacher
    if labels is None:
        return train(model, None, (inputs, None), settings, context, taught), facts
    last = replace(apart(settings, "labels"), epochs=labelled)
    blind = replace(apart(settings, "outputs"), epochs=settings.epochs - last.epochs,
                    loss="squared_error", distillation=1.0)  # fmt: skip
    context.progress(f"learning the dense network's outputs, {blind.epochs} epochs")
    model = train(model, None, (inputs, None), blind, context, graph)
    if labelled == 0:
        return model, facts
    context.progress(f"learning labels, {last.epochs} epochs")
    return train(model, None, data, last, context, taught), facts


def _labelled(asked: int | None, settings: FinetuneSettings) -> int:
    """How many of the epochs have labels."""
    if asked is None:
        return min(-(-settings.epochs // 2), LABELLED)  # rounded up: 0 means something else
    if not 0 <= asked <= settings.epochs:
        raise UserError(f"{asked} epochs with labels, of {settings.epochs}", where="labelled",
                        fix=f"at most {settings.epochs}, or more epochs")  # fmt: skip
    return asked


def apart(settings: FinetuneSettings, name: str) -> FinetuneSettings:
    """``settings`` with a folder of its own for the state of a training."""
    folder = settings.checkpoint
    return settings if folder is None else replace(settings, checkpoint=Path(folder) / name)
