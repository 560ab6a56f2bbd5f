"""OpenVINO on the CPU in the model's own precision: left alone it computes in bfloat16
where the CPU can."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import numpy as np

from edgepipe.errors import UserError
from edgepipe.machine import versions
from edgepipe.peers import Case, Engine, Outputs, timed

RUNNERS = ("local",)
_SETTINGS = {"NUM_STREAMS": "1", "INFERENCE_PRECISION_HINT": "f32"}


def missing() -> str:
    """The package that brings it."""
    there = importlib.util.find_spec("openvino")
    return "" if there else "pip install 'edgepipe[openvino]'"


def engines(case: Case) -> list[Engine]:
    """The original model, and the Q/DQ model, which it computes in integers. Raises UserError."""
    import openvino

    core, found = openvino.Core(), []
    settings = {**_SETTINGS, "INFERENCE_NUM_THREADS": case.threads}
    for form, model in case.onnx_forms().items():
        try:
            compiled = core.compile_model(core.read_model(model), "CPU", settings)
        except RuntimeError as error:
            said = " ".join(str(error).split())[:160]
            raise UserError(f"OpenVINO refuses the model: {said}", where="--against") from None
        request = compiled.create_infer_request()
        given = [case.inputs[port.get_any_name()] for port in compiled.inputs]
        for port, value in zip(compiled.inputs, given, strict=True):
            request.set_tensor(port, openvino.Tensor(np.ascontiguousarray(value)))
        found.append(Engine(f"OpenVINO {versions('openvino')['openvino']}{form}",
                            timed(request.infer), partial(_outputs, case, request)))  # fmt: skip
    return found


def _outputs(case: Case, request: Any) -> Outputs:
    request.infer()
    return {t.name: np.array(request.get_output_tensor(i).data)
            for i, t in enumerate(case.bundle.outputs)}  # fmt: skip
