"""From scheduled PrimFuncs to a plan and object files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgepipe.codegen.plan import Plan
from edgepipe.context import Context

if TYPE_CHECKING:  # reading a bundle must not load onnx_ir
    from edgepipe.lowering import Program


def generate(program: Program, context: Context, prefix: str) -> tuple[Plan, dict[str, bytes]]:
    """Compile the kernels and plan memory.

    Returns the plan and the kernels' code. For a CPU that is one object file per variant: ``""``
    for the target itself, and the names of ``target.variants``; for a GPU source, PTX and cubin
    by file name. Kernel symbols begin with ``prefix``.
    """
    from tvm import tirx

    from edgepipe.codegen import cuda
    from edgepipe.codegen.flatten import Flattener

    context.progress("planning memory")
    flat = Flattener(program, gpu=context.target.kind == "cuda")
    functions = {
        var.name_hint: function
        for var, function in program.module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    } | flat.copies
    called = sorted({call.function for call in flat.calls})
    symbols = {name: f"{prefix}_{name}" for name in called}

    context.progress(f"compiling {len(called)} kernels")
    chosen = {symbols[name]: functions[name] for name in called}
    if context.target.kind == "cuda":
        files, workspaces, gpu = cuda.build(chosen, context)
        return flat.plan(symbols, workspaces, gpu), files
    warmed = context.target.kind == "wasm"
    if warmed:
        cut = flat.worth_warming()
    else:
        cut = flat.worth_sharing() if context.threads != 1 else set()
    pieces = {symbols[name]: 1 for name in called if name in cut}
    objects, workspaces = _objects(chosen, program, symbols, context, pieces)
    if warmed:
        return flat.plan(symbols, workspaces, warmed=frozenset(pieces)), objects
    return flat.plan(symbols, workspaces, pieces=pieces, threads=context.threads), objects


def _objects(
    chosen: Mapping[str, Any],
    program: Program,
    symbols: Mapping[str, str],
    context: Context,
    pieces: dict[str, int],
) -> tuple[dict[str, bytes], dict[str, list[int]]]:
    """One object per variant; a variant's own functions replace those of the target."""
    from edgepipe.codegen.primfunc import build_object

    objects: dict[str, bytes] = {}
    workspaces: dict[str, list[int]] = {}
    for variant, attributes in {"": (), **context.target.variants}.items():
        own = program.variants.get(variant, {})
        replaced = {symbols[name]: own[name] for name in symbols if name in own}
        functions = {**chosen, **replaced}
        objects[variant], workspaces = build_object(functions, context.target, attributes, pieces)
    return objects, workspaces
