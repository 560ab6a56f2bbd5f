"""Executes a case through the passes, the converters and the default schedule, in TVM's VM.

Fast, because nothing is linked; code generation and driver are left out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax

from edgepipe import passes
from edgepipe.codegen import math
from edgepipe.context import Context
from edgepipe.lowering.schedule import schedule_default
from edgepipe.lowering.to_relax import to_relax
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.onnx_conformance.cases import Case

_TARGET = Target.load("host")
_R = relax.transform


def execute(case: Case) -> list[np.ndarray[Any, Any]]:
    """Outputs of ``case``; raises UserError when edgepipe refuses it."""
    math.register()
    graph = passes.run(ir.from_proto(case.model), Context(_TARGET, Recipe()))
    module = to_relax(graph)
    target = tvm.target.Target({"kind": "llvm", "mcpu": _TARGET.llvm["mcpu"]})
    with target:
        module = tvm.transform.Sequential(
            [
                _R.LegalizeOps(),
                _R.AnnotateTIROpPattern(),
                _R.FoldConstant(),
                _R.FuseOps(),
                _R.FuseTIR(),
                _R.DeadCodeElimination(),
            ]
        )(module)
    module = schedule_default(module, _TARGET)
    machine = relax.VirtualMachine(tvm.compile(module, target=target), tvm.cpu())
    inputs = [v for v in graph.graph.inputs if not v.is_initializer()]
    arrays = [case.inputs[v.name or ""] for v in inputs]
    # ascontiguousarray makes rank 0 rank 1.
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(a).reshape(a.shape)) for a in arrays]
    return [o.numpy() for o in machine["main"](*arguments)]
