"""Compile a small model through the whole compiler and run it in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from tests.onnx_conformance.batch import Batch
from tests.onnx_conformance.cases import Case


def run_model(
    model: onnx.ModelProto, inputs: Mapping[str, np.ndarray[Any, Any]]
) -> list[np.ndarray[Any, Any]]:
    """Outputs of ``model`` for ``inputs``. Raises UserError when edgepipe refuses it."""
    case = Case("model", model, dict(inputs), [], 0.0, 0.0)
    batch = Batch()
    batch.add(case)
    batch.link()
    return batch.run(case)
