"""Every network × every recipe × every Jetson GPU: all kernels assembled, each of them once.

``jetson.py`` makes whole bundles; this makes their kernels alone, so that it can be run over
everything. The graph is rewritten and quantized once per recipe and integer format; a kernel that
another pair already had for the same architecture is not assembled again; boards that compile to
the same code are one column. Each pair is appended to FILE as a line of JSON as soon as it is
known, and pairs that are in FILE already are passed over: an interrupted run goes on. Exit code 1
where a network does not compile, a kernel spills, or a network does not fit the board.

  jetson_grid.py [--models all|zoo|shared|A,B] [--targets jetson|A,B] [--recipes all|A,B]
                 [--file grid.jsonl]
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import arguments, chosen_models, chosen_targets, head, progress

from edgepipe import importer, passes, prune, quantize
from edgepipe.codegen.cuda import check_memory
from edgepipe.context import Context
from edgepipe.display import table
from edgepipe.errors import EdgepipeError
from edgepipe.recipe import Recipe
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


def graphs(model: str, recipe: str, targets: list[Target]) -> Iterator[tuple[Any, list[Target]]]:
    """The graph that is lowered, once for each way to store integers, and its boards."""
    by_integer = defaultdict(list)
    for target in targets:
        by_integer[target.integer].append(target)
    for same in by_integer.values():
        source = importer.load(model, None)
        context = Context(same[0], Recipe.load(recipe))
        graph = passes.run(source.model, context)
        graph, _ = prune.run(graph, source, None, context)
        graph, _ = quantize.run(graph, source, None, context)
        yield graph, same


def assemble(graph: Any, target: Target, recipe: str, known: dict[str, int], out: Any) -> None:
    """In a process of its own: lower, and assemble what is not ``known``; spills by kernel."""
    import tvm_ffi
    from tvm import tirx

    from edgepipe import lowering
    from edgepipe.codegen.cuda import device, host, toolkit
    from edgepipe.codegen.flatten import Flattener

    result: dict[str, Any] = {"kernels": {}, "assembled": 0}
    try:
        context, cuda = Context(target, Recipe.load(recipe)), target.cuda
        assert cuda is not None
        program = lowering.lower(graph, context)
        flat = Flattener(program, gpu=True)
        held = program.module.functions.items()
        functions = {v.name_hint: f for v, f in held if isinstance(f, tirx.PrimFunc)} | flat.copies
        names = {f"k{tvm_ffi.structural_hash(functions[c.function]) % 2**64:016x}": functions[c.function]
                 for c in flat.calls}  # fmt: skip
        mine = {name: f"{name}.{cuda.virtual_sm}.{cuda.ptx_isa}" for name in names}
        new = {name: names[name] for name, key in mine.items() if key not in known}
        built = device.build_source(new, target) if new else None
        if built is not None:
            _, _, _, resources = toolkit.assemble(built.source, cuda)
            for name, launches in built.launches.items():
                known[mine[name]] = sum(resources[x.symbol].spill_bytes for x in launches)
        symbols = {call.function: call.function for call in flat.calls}
        plan = flat.plan(symbols, defaultdict(list), None)
        check_memory(host.Block(plan).bytes, target)
        result["kernels"] = {key: known[key] for key in mine.values()}
        result["assembled"] = len(new)
    except EdgepipeError as error:
        result["error"] = str(error)
    out.send(result)


def apart(*given: Any) -> dict[str, Any]:
    """``assemble`` in a fork, which has the graph and may die."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=assemble, args=(*given, there))
    process.start()
    there.close()
    try:
        return dict(here.recv())
    except EOFError:
        return {"kernels": {}, "assembled": 0, "error": "the compiler died"}
    finally:
        process.join()


def run(model: str, path: str, recipe: str, targets: list[str], done: dict[Any, Any]) -> Iterator[Any]:
    """Results of one network and recipe that are not ``done`` yet."""
    columns = boards(targets, recipe).values()
    open_ = [same for same in columns if (model, recipe, same[0].name) not in done]
    known = {key: spill for r in done.values() for key, spill in r["kernels"].items()}
    try:
        for graph, group in graphs(path, recipe, [same[0] for same in open_]):
            for target in group:
                found = apart(graph, target, recipe, known)
                known |= found["kernels"]
                same = next(x for x in open_ if x[0] is target)
                yield {"model": model, "recipe": recipe, "target": target.name,
                       "same_code": [t.name for t in same[1:]], **found}  # fmt: skip
    except EdgepipeError as error:
        for same in open_:
            yield {"model": model, "recipe": recipe, "target": same[0].name, "same_code": [],
                   "kernels": {}, "assembled": 0, "error": str(error)}  # fmt: skip


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
    recipes = ["fp32", "fp16", "w8a16", "w8a8"] if options.recipes == "all" else options.recipes.split(",")
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
