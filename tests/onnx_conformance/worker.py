"""Runs the cases named on standard input, one JSON answer per line on standard output."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
import warnings
from typing import Any

import numpy as np

from edgepipe.errors import UserError
from tests.onnx_conformance.cases import Case, edge_core

#: Seconds one case may take.
TIMEOUT = 60


def judge(case: Case, backend: Any) -> tuple[str, str]:
    """Status and detail of one case."""
    try:
        outputs = backend.execute(case)
    except UserError as error:
        if os.environ.get("EDGEPIPE_CONFORMANCE_TRACE"):
            traceback.print_exc()
        return "refused", str(error)
    except Exception as error:
        if os.environ.get("EDGEPIPE_CONFORMANCE_TRACE"):
            traceback.print_exc()
        return "crashed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:300]}"
    return compare(case, outputs)


def compare(case: Case, outputs: list[np.ndarray[Any, Any]]) -> tuple[str, str]:
    """onnx's own comparison: exact types and shapes, values within the case's tolerance."""
    if len(outputs) != len(case.outputs):
        return "wrong", f"{len(outputs)} outputs instead of {len(case.outputs)}"
    for i, (got, expected) in enumerate(zip(outputs, case.outputs, strict=True)):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return "wrong", f"output {i} is {got.dtype}{list(got.shape)}"
        try:
            np.testing.assert_allclose(got, expected, rtol=case.rtol, atol=case.atol)
        except AssertionError as error:
            lines = [x.strip() for x in str(error).splitlines() if x.strip()]
            return "wrong", f"output {i}: " + "; ".join(lines[1:4])
    return "passed", ""


def main() -> None:
    """Judge every case on standard input with the backend named on the command line."""
    backend = importlib.import_module(f"tests.onnx_conformance.backend_{sys.argv[1]}")
    warnings.simplefilter("ignore")
    cases = edge_core()
    for line in sys.stdin:
        name = line.strip()
        signal.alarm(TIMEOUT)  # ends the process; the parent records the case as crashed
        status, detail = judge(cases[name], backend)
        print(json.dumps({"name": name, "status": status, "detail": detail}), flush=True)


if __name__ == "__main__":
    main()
