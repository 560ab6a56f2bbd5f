"""From scheduled PrimFuncs to a plan and object files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgepipe.codegen.plan import Plan
from edgepipe.context import Context

if TYPE_CHECKING:  # reading a bundle must not load onnx_ir
    from edgepipe.lowering import Program


def generate(program: Program, context: Context, prefix: str) -> tuple[Plan, dict[str, bytes]]:
    """Compile the kernels and plan memory.

    Returns the plan and one object file per variant: ``""`` for the target itself, and the names
    of ``target.variants``. Kernel symbols begin with ``prefix``.
    """
    from tvm import tirx

    from edgepipe.codegen.flatten import Flattener
    from edgepipe.codegen.primfunc import build_object

    context.progress("planning memory")
    flat = Flattener(program)
    functions = {
        var.name_hint: function
        for var, function in program.module.functions.items()
        if isinstance(function, tirx.PrimFunc)
    } | flat.copies
    called = {call.function for call in flat.calls}
    symbols = {name: f"{prefix}_{name}" for name in sorted(called)}

    context.progress(f"compiling {len(called)} kernels")
    objects: dict[str, bytes] = {}
    workspaces: dict[str, list[int]] = {}
    for variant, attributes in {"": (), **context.target.variants}.items():
        own = program.variants.get(variant, {})
        chosen = {symbols[name]: own.get(name, functions[name]) for name in sorted(called)}
        objects[variant], workspaces = build_object(chosen, context.target, attributes)
    return flat.plan(symbols, workspaces), objects
