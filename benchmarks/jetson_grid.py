"""Every network × every recipe × every Jetson GPU: all kernels assembled, each of them once.

``jetson.py`` makes whole bundles; this makes their kernels alone, so that it can be run over
everything. A network is quantized and lowered once per recipe, its templates are chosen for each
board; a kernel that was assembled for the same architecture before is not assembled again; boards
that compile to the same code are one column. Each board's result is appended to FILE as a line of
JSON as soon as it is known, and what is in FILE already is passed over: an interrupted run goes on.
Exit code 1 where a network does not compile or a kernel spills.

  jetson_grid.py [--models all|zoo|shared|A,B] [--targets jetson|A,B] [--recipes all|A,B]
                 [--file grid.jsonl]
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import arguments, chosen_models, chosen_targets, head, progress

from edgepipe import importer, passes, prune, quantize
from edgepipe.context import Context
from edgepipe.display import table
from edgepipe.errors import EdgepipeError
from edgepipe.recipe import Recipe, Settings
from edgepipe.target import Target


def boards(names: list[str], recipe: str) -> dict[tuple[Any, ...], list[Target]]:
    """Boards that offer ``recipe``, by what kernels know of them."""
    found = defaultdict(list)
    for target in map(Target.load, names):
        assert target.cuda is not None
        if recipe in target.recipes:
            cuda = target.cuda
            found[cuda.sm, cuda.processors, cuda.ptx_isa, target.integer].append(target)
    return found


def graph_of(model: str, recipe: Recipe, target: Target) -> Any:
    """The graph that is lowered. How well it is quantized does not matter here."""
    source, context = importer.load(model, None), Context(target, recipe)
    graph = passes.run(source.model, context)
    graph, _ = prune.run(graph, source, None, context)
    return quantize.run(graph, source, None, context)[0]


class Kernels:
    """The kernels of one graph: lowered once, as all boards compute the same operators."""

    def __init__(self, graph: Any, target: Target, recipe: Recipe) -> None:
        from tvm import tirx

        from edgepipe import lowering

        program = lowering.lower(graph, Context(target, recipe))
        functions = [f for f in program.module.functions.values() if isinstance(f, tirx.PrimFunc)]
        self.others = [f for f in functions if "edgepipe.template" not in (f.attrs or {})]
        self.ops = {n.meta["kernel"].op for n in graph.graph.all_nodes() if "kernel" in n.meta}
        self.emitted: dict[Any, Any] = {}

    def of(self, target: Target) -> dict[str, Any]:
        """Name, which tells its content → PrimFunc."""
        import tvm_ffi

        from edgepipe.kernels.template import select

        found = list(self.others)
        for op in self.ops:
            template, reasons = select(op, target)
            if template is None:
                raise EdgepipeError(f"no kernel for {op}: {'; '.join(reasons)}")
            knobs = template.default(op, target)
            key = template.name, op, tuple(sorted(knobs.items()))
            if key not in self.emitted:
                self.emitted[key] = template.emit(op, knobs)
            found.append(self.emitted[key])
        return {f"k{tvm_ffi.structural_hash(f) % 2**64:016x}": f for f in found}


def assemble(
    model: str, recipe: Recipe, targets: list[Target], known: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Assemble, for each board, what is not ``known``; spilled bytes by kernel."""
    from edgepipe.codegen.cuda import device, toolkit

    kernels = Kernels(graph_of(model, recipe, targets[0]), targets[0], recipe)
    for target in targets:
        cuda, result = target.cuda, {"target": target.name, "kernels": {}, "assembled": 0}
        assert cuda is not None
        try:
            functions = kernels.of(target)
            keys = {name: f"{name}.{cuda.virtual_sm}.{cuda.ptx_isa}" for name in functions}
            new = {name: f for name, f in functions.items() if keys[name] not in known}
            if new:
                built = device.build_source(new, target)
                resources = toolkit.assemble(built.source, cuda)[-1]
                for name, launches in built.launches.items():
                    known[keys[name]] = sum(resources[x.symbol].spill_bytes for x in launches)
            result["kernels"] = {key: known[key] for key in keys.values()}
            result["assembled"] = len(new)
        except EdgepipeError as error:
            result["error"] = str(error)
        yield result


def _send(out: Any, *given: Any) -> None:
    try:
        for result in assemble(*given):
            out.send(result)
    except EdgepipeError as error:
        out.send({"target": "", "kernels": {}, "assembled": 0, "error": str(error)})


def apart(*given: Any) -> Iterator[dict[str, Any]]:
    """``assemble`` in a process of its own, which may die."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, *given))
    process.start()
    there.close()
    while True:
        try:
            yield here.recv()
        except EOFError:
            break
    process.join()
    if process.exitcode:
        yield {"target": "", "kernels": {}, "assembled": 0, "error": "the compiler died"}


def run(
    model: str, path: str, recipe: str, targets: list[str], done: dict[Any, Any]
) -> Iterator[dict[str, Any]]:
    """Results of one network and recipe that are not ``done`` yet."""
    columns = boards(targets, recipe).values()
    open_ = [same for same in columns if (model, recipe, same[0].name) not in done]
    if not open_:
        return
    known = {key: spill for r in done.values() for key, spill in r["kernels"].items()}
    chosen = Recipe.parse(recipe)
    if chosen.format not in ("fp32", "fp16"):
        cheap = Settings(observer="minmax", methods=(), max_samples=2)
        chosen = replace(chosen, settings=cheap)
    names = {same[0].name: [t.name for t in same[1:]] for same in open_}
    for found in apart(path, chosen, [same[0] for same in open_], known):
        same = names.get(found["target"], [])
        yield {"model": model, "recipe": recipe, "same_code": same, **found}


def read(path: Path) -> dict[Any, Any]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    results = [json.loads(line) for line in lines if line.endswith("}")]
    return {(r["model"], r["recipe"], r["target"]): r for r in results}


def summary(results: list[dict[str, Any]]) -> int:
    """The table, networks × recipes, and what failed. Returns the exit code."""
    rows: dict[tuple[str, str], list[Any]] = {}
    for r in results:
        row = rows.setdefault((r["model"], r["recipe"]), [0, 0, 0, 0])
        row[0] += 1 + len(r["same_code"])
        row[1] += len(r["kernels"])
        row[2] += sum(r["kernels"].values())
        row[3] += "error" in r
    headers = ["model", "recipe", "boards", "kernels", "spilled bytes", "errors"]
    print(table(headers, [[*key, *row] for key, row in rows.items()], markdown=True))
    failed = [r for r in results if "error" in r or any(r["kernels"].values())]
    for r in failed:
        what = r.get("error") or f"{sum(r['kernels'].values())} bytes spilled"
        print(f"{r['model']} {r['recipe']} {r['target']}: {what}")
    distinct = {key for r in results for key in r["kernels"]}
    print(f"\n{len(results) - len(failed)} of {len(results)} compile without spills; "
          f"{len(distinct)} different kernels assembled")  # fmt: skip
    return 1 if failed else 0


def main() -> int:
    options = arguments(
        __doc__, models="all", targets="jetson", recipes="all", file="jetson-grid.jsonl"
    )
    head("Networks × recipes × Jetson GPUs: kernels assembled", "apache-tvm",
         "nvidia-cuda-nvrtc-cu12")  # fmt: skip
    file, targets = Path(options.file), chosen_targets(options.targets)
    every = ["fp32", "w8a8", "fp16", "w8a16"]
    recipes = every if options.recipes == "all" else options.recipes.split(",")
    models, results = chosen_models(options.models), read(file)
    for recipe in recipes:
        for name, path in models.items():
            for result in run(name, path, recipe, targets, results):
                results[name, recipe, result["target"]] = result
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(result) + "\n")
                progress(f"{name} {recipe} {result['target']} {len(result['kernels'])} kernels, "
                         f"{result['assembled']} new, {sum(result['kernels'].values())} spilled "
                         f"{result.get('error', '')}")  # fmt: skip
    wanted = {(m, r) for m in models for r in recipes}
    return summary([r for r in results.values() if (r["model"], r["recipe"]) in wanted])


if __name__ == "__main__":
    sys.exit(main())
