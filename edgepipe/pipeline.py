"""The pipeline: one value flows one way, from a model to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepipe import (
    bundle,
    emitted,
    golden_file,
    importer,
    memory,
    passes,
    prune,
    quantize,
    self_check,
)
from edgepipe import records as tuning_records
from edgepipe.blob import Blob
from edgepipe.bundle import Bundle
from edgepipe.codegen import cuda, driver, tvm_alone
from edgepipe.context import Context, Note
from edgepipe.golden_file import GoldenFile
from edgepipe.recipe import Recipe
from edgepipe.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.importer.source import Source
    from edgepipe.prune import Pruned
    from edgepipe.quantize import Calibration, Quantized
    from edgepipe.records import Record, Records
    from edgepipe.tuning import Plan


def compile(
    model: str | Path,
    *,
    target: str | Target,
    recipe: str | Recipe | None = None,
    calibration: Calibration | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    output: str | Path | None = None,
    prefix: str = "model",
    emit: Sequence[str] = (),
    allow_float_fallback: bool = False,
    check: bool = False,
    dump_dir: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
    notes: list[Note] | None = None,
    threads: int = 1,
    records: str | Path | None = None,
    tuning: Plan | None = None,
) -> Bundle:
    """Compile ``model`` for ``target`` into a bundle folder and return it.

    ``model`` is a path to ``.onnx`` or ``.pt2``, ``package.module:factory`` for a torch module,
    or a zoo name. ``recipe`` is a line, a ``.toml`` file or a Recipe (default: fp32, or what the
    Q/DQ nodes of a quantized model say). ``calibration`` is SRC (see ``edgepipe.data``), arrays
    by input name or opened samples. ``shapes`` fixes symbolic dimensions by input name; a free
    batch becomes 1. ``emit`` adds the quantized model as "onnx" or "tflite".
    ``allow_float_fallback``: a quantized operator without an integer kernel is no error.
    ``threads`` share an inference of the bundle (CPUs only); 0: as many as the device has cores.
    ``check``: where a runner is here, the bundle computes its golden inputs before it is written.
    ``notes`` receives the reasons for what the stages did and did not do. ``records`` is a file of
    tuning records to prefer to those that come with edgepipe, or "none" for neither. With
    ``tuning`` the network's operators are tuned first.
    Raises UserError for everything the caller can mend, ValidationFailed by ``check``.
    """
    target = target if isinstance(target, Target) else Target.load(target)
    given = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    quantize.check(given, target, calibration)
    driver.check_prefix(prefix)
    driver.check_threads(threads, target)

    progress = memory.trimmed(progress)
    progress("reading the model")
    source = importer.load(model, shapes)
    chosen = quantize.recipe_of(source, given, calibration)
    target.check(chosen)
    cuda.check(target)
    emitted.check(emit, chosen)
    destination = bundle.destination(output, source, target, chosen)
    allow_float_fallback |= chosen.settings.allow_float_fallback
    notes = [] if notes is None else notes
    found = _records(records, notes)
    context = Context(
        target, chosen, dump_dir, progress, notes, allow_float_fallback, threads, found
    )
    tvm_alone.load()
    with importer.judged(source):
        files = _files(source, calibration, context, prefix, emit, tuning)
        look = partial(self_check.check if check else self_check.skip, source=source,
                       context=context)  # fmt: skip
        return bundle.install(destination, files, look)


def _files(
    source: Source, calibration: Calibration | None, context: Context, prefix: str,
    emit: Sequence[str], tuning: Plan | None,
) -> dict[str, bytes | Blob]:  # fmt: skip
    """The stages: everything that is in the bundle. What they hand on is freed on the way."""
    from edgepipe import codegen, lowering  # these import tvm

    # Before there is a graph beside the model, where its answers are all that is asked for.
    golden = None if context.recipe.changes_weights else _golden(source, context)
    graph, pruned, quantized = _graph(source, calibration, context)
    golden = golden or _golden(source, context, quantized, pruned)
    extra = emitted.files(emit, quantized, context)
    tune = None if tuning is None else _tuner(tuning, context)
    # No name for the program: its weights go on as those of the plan.
    plan, objects = codegen.generate(lowering.lower(graph, context, tune), context, prefix)
    return bundle.contents(source, plan, objects, context, prefix, golden, quantized, extra, pruned)


def tune(
    model: str | Path,
    *,
    target: str | Target,
    tuning: Plan,
    recipe: str | Recipe | None = None,
    calibration: Calibration | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
    notes: list[Note] | None = None,
) -> list[Record]:
    """Tune the operators of ``model`` for ``target`` as ``tuning`` says; arguments as ``compile``.

    Returns a record of each. Raises UserError.
    """
    target = target if isinstance(target, Target) else Target.load(target)
    given = Recipe.load(recipe) if isinstance(recipe, str) else recipe
    quantize.check(given, target, calibration)
    progress("reading the model")
    source = importer.load(model, shapes)
    chosen = quantize.recipe_of(source, given, calibration)
    target.check(chosen)
    notes = [] if notes is None else notes
    context = Context(target, chosen, progress=progress, notes=notes)
    tvm_alone.load()
    from edgepipe import lowering

    found: list[Record] = []
    lowering.lower(_graph(source, calibration, context)[0], context, _tuner(tuning, context, found))
    return found


def _graph(
    source: Source, calibration: Calibration | None, context: Context
) -> tuple[ir.Model, Pruned | None, Quantized | None]:
    """The graph that is lowered, and what pruning and quantizing did."""
    context.progress("rewriting the graph")
    graph = passes.run(source.model, context)
    graph, pruned = prune.run(graph, source, calibration, context)
    graph, quantized = quantize.run(graph, source, calibration, context)
    return graph, pruned, quantized


def _golden(
    source: Source,
    context: Context,
    quantized: Quantized | None = None,
    pruned: Pruned | None = None,
) -> GoldenFile:
    context.progress("computing golden outputs")
    inputs, outputs = quantize.inputs_of(source.model), source.model.graph.outputs
    return golden_file.make(source, inputs, [str(o.name) for o in outputs], quantized, pruned)


def _records(given: str | Path | None, notes: list[Note]) -> Records:
    if given == "none":
        return tuning_records.NO_RECORDS
    parts = [tuning_records.shipped()]
    if given is not None:
        parts.append(tuning_records.read(Path(given)))
    found = tuning_records.merged(parts)
    notes += [Note("records", "--records", remark) for remark in found.remarks]
    return found


def _tuner(
    plan: Plan, context: Context, found: list[Record] | None = None
) -> Callable[[Any], Records]:
    """What ``lowering.lower`` is to call; records are added to ``found``, too."""

    def tune(subject: Any) -> Records:
        from edgepipe import tuning as stage
        from edgepipe.tuning import search

        tasks = stage.tasks(subject, context)
        new = search.tune(tasks, context.target, plan, context.progress) if tasks else []
        if found is not None:
            found.extend(new)
        given = tuning_records.read(plan.file) if plan.file.exists() else tuning_records.NO_RECORDS
        return tuning_records.merged([context.records, given])

    return tune
