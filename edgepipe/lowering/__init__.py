"""From a canonical ONNX graph to one Relax function that only calls kernels.

The stages are the order of ``lower``: find what runs as templates, choose layouts, build Relax,
and let TVM legalise, fuse and schedule the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import onnx_ir as ir

from edgepipe.codegen.plan import KernelAudit
from edgepipe.context import Context
from edgepipe.records import Records


@dataclass(frozen=True)
class Program:
    """``module["main"]`` is a list of ``call_tir`` and reshapes; every PrimFunc is scheduled.

    ``audits`` holds, per template kernel, one entry per call in call order. ``variants`` has the
    PrimFuncs that differ in a variant of the target, ``tuned`` whose record scheduled a function.
    ``inputs`` and ``outputs`` are the ONNX names in order.
    """

    module: Any
    audits: dict[str, list[KernelAudit]]
    variants: dict[str, dict[str, Any]]
    tuned: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def describe_kernels(model: ir.Model, context: Context) -> None:
    """Replace what templates execute in ``model`` by kernel nodes with layouts."""
    from edgepipe.lowering import groups, halves, integers, layouts, sparsity, weights

    context.progress("choosing kernels and layouts")
    integers.fold(model, context)
    weights.fold(model, context)
    found = groups.find(model.graph, context)
    halves.store(model.graph, found, context)
    layouts.assign(model, found, sparsity.choose(found, context), context)
    context.dump("lowering-00-layouts.txt", lambda: str(model))


def lower(
    model: ir.Model, context: Context, tune: Callable[[Any], Records] | None = None
) -> Program:
    """Lower ``model`` (static shapes, canonical ONNX) for ``context.target``.

    ``tune`` is given the graph with its kernel nodes, then the IRModule of what they leave, and
    returns the records to go by.
    Raises Unsupported, naming the op, for what edgepipe does not compile.
    """
    import tvm
    from tvm import relax

    from edgepipe.lowering import pace
    from edgepipe.lowering.emit import Emitter
    from edgepipe.lowering.schedule import schedule_rest
    from edgepipe.lowering.to_relax import to_relax

    names = tuple(v.name or "" for v in model.graph.inputs if not v.is_initializer())
    outputs = tuple(v.name or "" for v in model.graph.outputs)
    describe_kernels(model, context)
    if tune is not None:
        context = replace(context, records=tune(model.graph))
    emitter = Emitter(context)
    module = to_relax(model, emitter)
    context.dump("lowering-01-relax.txt", module.script)
    pace.judge(chain.from_iterable(emitter.audits.values()), context)
    context.progress("lowering the rest with TVM")
    transform = relax.transform
    with tvm.target.Target({"kind": "llvm"}), tvm.transform.PassContext(opt_level=3):
        module = tvm.transform.Sequential(
            [
                # Reshapes stay: the flat program turns them into aliases.
                transform.LegalizeOps(_as_reshapes(), skip_ops=["relax.reshape"]),
                transform.AnnotateTIROpPattern(),
                transform.FoldConstant(),
                transform.FuseOps(),
                transform.FuseTIR(),
                transform.DeadCodeElimination(),
            ]
        )(module)
    if tune is not None:
        context = replace(context, records=tune(module))
    module, tuned = schedule_rest(module, context)
    context.dump("lowering-02-kernels.txt", module.script)
    return Program(module, emitter.audits, emitter.variants, tuned, names, outputs)


def _as_reshapes() -> dict[str, Any]:
    """Operators that only rename dimensions, as reshapes."""
    from tvm import relax

    def reshape(builder: Any, call: Any) -> Any:
        return relax.op.reshape(call.args[0], call.ty.shape)

    return {f"relax.{name}": reshape for name in ("expand_dims", "squeeze", "flatten")}
