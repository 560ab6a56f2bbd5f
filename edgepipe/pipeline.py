"""The pipeline: one value flows one way, from a model to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from edgepipe import bundle, importer, passes
from edgepipe.bundle import Bundle
from edgepipe.codegen import driver
from edgepipe.context import Context, Note
from edgepipe.recipe import Recipe
from edgepipe.target import Target


def compile(
    model: str | Path,
    *,
    target: str | Target,
    recipe: str | Recipe = "fp32",
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    output: str | Path | None = None,
    prefix: str = "model",
    dump_dir: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
    notes: list[Note] | None = None,
) -> Bundle:
    """Compile ``model`` for ``target`` into a bundle folder and return it.

    ``model`` is a path to ``.onnx`` or ``.pt2``, ``package.module:factory`` for a torch module,
    or a zoo name. ``shapes`` fixes symbolic dimensions by input name; a free batch becomes 1.
    ``notes`` receives the reasons for what the stages did and did not do.
    Raises UserError for everything the caller can mend.
    """
    target = target if isinstance(target, Target) else Target.load(target)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    target.check(recipe)
    context = Context(target, recipe, dump_dir, progress, [] if notes is None else notes)
    driver.check_prefix(prefix)

    progress("reading the model")
    source = importer.load(model, shapes)
    destination = bundle.destination(output, source, target, recipe)
    from edgepipe import codegen, lowering  # these import tvm, which takes a second

    progress("rewriting the graph")
    graph = passes.run(source.model, context)
    program = lowering.lower(graph, context)
    plan, objects = codegen.generate(program, context, prefix)
    return bundle.write(destination, source, plan, objects, context, prefix)
