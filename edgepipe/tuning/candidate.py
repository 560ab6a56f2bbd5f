"""From two kernels of one operator to something that can be measured, by MetaSchedule's builder.

A candidate is linked together with the kernel of the default rule, so that both are measured in
turn in one process, under the same noise, on whichever board it comes to.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.builder import BuilderInput, BuilderResult, PyBuilder

from edgepipe.codegen import driver, link
from edgepipe.codegen.primfunc import buffer_bytes, build_object
from edgepipe.errors import EdgepipeError
from edgepipe.target import Target

#: Symbols of the kernel of the default rule and of the candidate.
SYMBOLS = ("candidate_0", "candidate_1")


def pair(default: Any, candidate: Any) -> Any:
    """IRModule of the two PrimFuncs."""
    functions = {
        symbol: function.with_attr("global_symbol", symbol)
        for symbol, function in zip(SYMBOLS, (default, candidate), strict=True)
    }
    return tvm.IRModule(functions)


def build(module: Any, target: Target, form: str) -> bytes:
    """The pair as ``form`` (see ``link.candidate``). Raises EdgepipeError and UserError."""
    functions = {var.name_hint: function for var, function in module.functions.items()}
    ordered = {symbol: functions[symbol] for symbol in SYMBOLS}
    # Tensors as the kernels declare them, before lowering turns them into pointers.
    arguments = {
        symbol: [(str(p.dtype), buffer_bytes(p)) for p in function.params]
        for symbol, function in ordered.items()
    }
    if target.kind == "cuda":
        return _for_gpu(ordered, arguments, target, form)
    code, workspaces = build_object(ordered, target)
    for symbol, sizes in workspaces.items():
        arguments[symbol] += [("int8", size) for size in sizes]
    return link.candidate(target, driver.candidate_source(arguments), code, form)


def _for_gpu(
    functions: dict[str, Any],
    arguments: dict[str, list[tuple[str, int]]],
    target: Target,
    form: str,
) -> bytes:
    from edgepipe.codegen.cuda import CUBIN, PTX, host, toolkit
    from edgepipe.codegen.cuda.device import build_source

    assert target.cuda is not None
    device = build_source(functions, target)
    _, ptx, cubin, _ = toolkit.assemble(device.source, target.cuda)
    code = {PTX: ptx.encode(), **({} if target.cuda.ptx_sm else {CUBIN: cubin})}
    for symbol, sizes in device.workspaces.items():
        arguments[symbol] += [("int8", size) for size in sizes]
    launches = [device.launches[symbol] for symbol in SYMBOLS]
    counts = [len(arguments[symbol]) for symbol in SYMBOLS]
    sources = {
        "candidate.c": driver.candidate_source(arguments),
        "candidate_gpu.c": host.candidate(launches, counts, target.cuda, code),
    }
    return link.gpu_candidate(target, sources, code, form)


@derived_object
class Builder(PyBuilder):  # type: ignore[misc]
    """Builds pairs of kernels for a target into files of a folder."""

    def __init__(self, target: Target, form: str, folder: Path) -> None:
        super().__init__()
        self.target, self.form, self.folder, self.count = target, form, folder, 0

    def build(self, build_inputs: Sequence[BuilderInput]) -> list[BuilderResult]:
        """One file per module; what cannot be built has a message instead."""
        results = []
        for given in build_inputs:
            self.count += 1
            path = self.folder / f"candidate-{self.count}{'.so' * (self.form == 'LIBRARY')}"
            try:
                path.write_bytes(build(given.mod, self.target, self.form))
                path.chmod(0o755)
                results.append(BuilderResult(str(path), None))
            except (EdgepipeError, tvm.TVMError) as error:
                results.append(BuilderResult(None, str(error)))
        return results
