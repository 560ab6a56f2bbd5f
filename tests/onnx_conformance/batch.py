"""Executes cases the way a bundle does: passes, lowering, code generation, linked kernels.

The kernels of a batch of cases are linked into one shared library with zig; each case's plan is
then carried out over ctypes with its own arena, exactly as the C driver does it.
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe import codegen, lowering, passes
from edgepipe.codegen import link
from edgepipe.codegen.plan import ALIGNMENT, Place, Plan
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.onnx_conformance.cases import Case

_TARGET = Target.load("host")


class Batch:
    """Cases compiled together. ``add`` may raise UserError; after ``link`` they can run."""

    def __init__(self) -> None:
        self.plans: dict[str, Plan] = {}
        self.objects: list[bytes] = []
        self.library: ctypes.CDLL | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="edgepipe-conformance-")

    def add(self, case: Case) -> None:
        """Compile ``case``; raises UserError when edgepipe refuses it."""
        context = Context(_TARGET, Recipe())
        graph = passes.run(ir.from_proto(case.model), context)
        program = lowering.lower(graph, context)
        plan, objects = codegen.generate(program, context, f"c{len(self.objects)}")
        self.plans[case.name] = plan
        self.objects.append(objects[""])

    def link(self) -> None:
        """Link everything compiled so far into one library."""
        work = Path(self._folder.name)
        names = []
        for i, content in enumerate(self.objects):
            names.append(f"k{i}.o")
            (work / names[-1]).write_bytes(content)
        (work / "libmath.a").write_bytes(link.math_library(_TARGET))
        link.zig(
            *("ld.lld", "-shared", "-z", "defs", "-o", "kernels.so", *names, "libmath.a"),
            cwd=work,
        )
        self.library = ctypes.CDLL(str(work / "kernels.so"))

    def run(self, case: Case) -> list[np.ndarray[Any, Any]]:
        """Outputs of ``case``; every buffer is poisoned first, so that unwritten bytes show."""
        assert self.library is not None
        plan = self.plans[case.name]
        arena = _aligned(plan.arena_bytes, 0xA5)
        weights = _aligned(len(plan.weights), 0)
        weights[: len(plan.weights)] = np.frombuffer(bytes(plan.weights), np.uint8)
        inputs = []
        for spec in plan.inputs:
            array = np.ascontiguousarray(case.inputs[spec.name]).reshape(-1)
            buffer = _aligned(array.nbytes, 0)
            buffer[: array.nbytes] = array.view(np.uint8)
            inputs.append(buffer)
        outputs = [
            _aligned(int(np.prod(s.shape, dtype=np.int64)) * np.dtype(s.dtype).itemsize, 0xA5)
            for s in plan.outputs
        ]

        def address(place: Place) -> ctypes.c_void_p:
            buffer = {"arena": arena, "weights": weights}.get(place.space)
            if buffer is None:
                buffer = (inputs if place.space == "input" else outputs)[place.index]
            return ctypes.c_void_p(buffer.ctypes.data + place.offset)

        for call in plan.calls:
            self.call(case, call.symbol, [address(p) for p in call.arguments])
        return [
            o.view(s.dtype)[: int(np.prod(s.shape, dtype=np.int64))].reshape(s.shape).copy()
            for o, s in zip(outputs, plan.outputs, strict=True)
        ]

    def call(self, case: Case, symbol: str, pointers: list[ctypes.c_void_p]) -> None:
        """Execute one kernel of ``case``."""
        getattr(self.library, symbol)(*pointers)


def _aligned(size: int, fill: int) -> np.ndarray[Any, Any]:
    """At least ``size`` bytes, rounded up and aligned to a cache line, all ``fill``."""
    size = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
    raw = np.full(size + ALIGNMENT, fill, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]
