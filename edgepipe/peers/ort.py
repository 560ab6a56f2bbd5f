"""ONNX Runtime on the CPU."""

from __future__ import annotations

from functools import partial

from edgepipe.machine import versions
from edgepipe.peers import Case, Engine, timed
from edgepipe.reference import run_session, session

RUNNERS = ("local",)


def missing() -> str:
    """It is always there: it is the reference."""
    return ""


def engines(case: Case) -> list[Engine]:
    """The original model, and the Q/DQ model with integer kernels. Raises UserError."""
    found = []
    for form, model in case.onnx_forms().items():
        opened = case.reference.session
        if form or case.threads > 1:
            opened = session(model, True if form else None, case.threads)
        inputs = {i.name: case.inputs[i.name] for i in opened.get_inputs()}
        found.append(Engine(f"ONNX Runtime {versions('onnxruntime')['onnxruntime']}{form}",
                            timed(partial(opened.run, None, inputs)),
                            partial(run_session, opened, inputs)))  # fmt: skip
    return found
