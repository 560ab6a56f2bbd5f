"""A sample of ONNX's own cases as GPU kernels: assembled for a TX2, executed on the CPU."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from cuda.emulation import FLAGS, to_cpp, zig
from edgepipe import codegen, lowering, passes
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from tests.onnx_conformance.batch import Batch
from tests.onnx_conformance.cases import Case, edge_core
from tests.onnx_conformance.run import STATUS
from tests.onnx_conformance.worker import compare

pytestmark = [pytest.mark.slow, pytest.mark.needs_cuda_toolkit]

#: Every this many-th of the cases that pass on CPUs.
SAMPLE = 60


class GpuBatch(Batch):
    """Cases whose kernels are CUDA source; linked as C++."""

    def add(self, case: Case) -> None:
        context = Context(Target.load("jetson-tx2"), Recipe())
        graph = passes.run(ir.from_proto(case.model), context)
        prefix = f"c{len(self.objects)}"
        plan, files = codegen.generate(lowering.lower(graph, context), context, prefix)
        assert plan.gpu is not None
        assert not any(r.spill_bytes for r in plan.gpu.resources.values())
        self.plans[case.name] = plan
        self.objects.append(files["model.cu"])

    def link(self) -> None:
        work = Path(self._folder.name)
        parts = [to_cpp(source.decode())[0] for source in self.objects if b"__global__" in source]
        (work / "kernels.cpp").write_text("\n".join(dict.fromkeys(parts)), encoding="utf-8")
        zig(work, "c++", *FLAGS, "-o", "kernels.so", "kernels.cpp")
        self.library = ctypes.CDLL(str(work / "kernels.so"))

    def call(self, case: Case, symbol: str, pointers: list[ctypes.c_void_p]) -> None:
        gpu = self.plans[case.name].gpu
        assert gpu is not None
        packed = (ctypes.c_void_p * len(pointers))(*(p.value for p in pointers))
        for launch in gpu.launches[symbol]:
            function = getattr(self.library, f"run_{launch.symbol}")
            function(packed, *launch.blocks, int(np.prod(launch.threads)), 1)


def test_cases_that_pass_on_cpus_pass_on_a_gpu() -> None:
    passed = [n for n, s in json.loads(STATUS.read_text("utf-8")).items() if s == "passed"]
    cases = [edge_core()[name] for name in sorted(passed)[7::SAMPLE]]
    batch, wrong = GpuBatch(), {}
    for case in cases:
        batch.add(case)
    batch.link()
    for case in cases:
        status, detail = compare(case, batch.run(case))
        if status != "passed":
            wrong[case.name] = detail
    assert not wrong
