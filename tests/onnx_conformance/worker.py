"""Runs the cases named on standard input; one JSON answer per line on standard output.

``{"name": …, "status": "started"}`` precedes whatever may take the process down.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from edgepipe.errors import UserError
from tests.onnx_conformance.batch import Batch
from tests.onnx_conformance.cases import Case, edge_core

#: Cases linked together: linking costs as much as compiling two cases.
BATCH = 48
#: Seconds one step of one case may take.
TIMEOUT = 60

#: Cases whose expected values carry the reference's own rounding: (atol, rtol, why).
TOLERANCES: dict[str, tuple[float, float, str]] = {
    "test_dft_inverse": (1e-6, 1e-3, "expected zeros are 2e-7: noise of the reference FFT"),
    "test_dft_inverse_opset19": (1e-6, 1e-3, "expected zeros are 2e-7: noise of the reference FFT"),
    "test_attention_4d_causal_fp16": (1e-3, 1e-3, "one unit in the last place of float16"),
    "test_attention_4d_causal_fp16_expanded": (1e-3, 1e-3, "as above"),
    "test_attention_4d_gqa_with_past_and_present_fp16_expanded": (1e-3, 1e-3, "as above"),
}


def compare(case: Case, outputs: list[np.ndarray[Any, Any]]) -> tuple[str, str]:
    """onnx's own comparison: exact types and shapes, values within the case's tolerance."""
    atol, rtol, _ = TOLERANCES.get(case.name, (case.atol, case.rtol, ""))
    if len(outputs) != len(case.outputs):
        return "wrong", f"{len(outputs)} outputs instead of {len(case.outputs)}"
    for i, (got, expected) in enumerate(zip(outputs, case.outputs, strict=True)):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return "wrong", f"output {i} is {got.dtype}{list(got.shape)}"
        try:
            np.testing.assert_allclose(got, expected, rtol=rtol, atol=atol)
        except AssertionError as error:
            lines = [x.strip() for x in str(error).splitlines() if x.strip()]
            return "wrong", f"output {i}: " + "; ".join(lines[1:4])
    return "passed", ""


def attempt(step: Callable[[], tuple[str, str] | None]) -> tuple[str, str] | None:
    """Run one step of a case; what it raises becomes the case's status and detail."""
    try:
        return step()
    except Exception as error:
        if os.environ.get("EDGEPIPE_CONFORMANCE_TRACE"):
            traceback.print_exc()
        if isinstance(error, UserError):
            return "refused", str(error)
        return "crashed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1][:300]}"


def _say(name: str, status: str, detail: str = "") -> None:
    print(json.dumps({"name": name, "status": status, "detail": detail}), flush=True)
    signal.alarm(TIMEOUT)  # ends the process; the parent records the started case as crashed


def judge(cases: list[Case]) -> None:
    """Compile, link and run a batch, and print the results."""
    batch = Batch()
    compiled = []
    for case in cases:
        _say(case.name, "started")
        answer = attempt(lambda case=case: batch.add(case))  # type: ignore[misc]
        if answer is None:
            compiled.append(case)
        else:
            _say(case.name, *answer)
    batch.link()
    for case in compiled:
        _say(case.name, "started")
        if os.environ.get("EDGEPIPE_CONFORMANCE_CRASH") == case.name:
            os.abort()  # the runner's own test
        answer = attempt(lambda case=case: compare(case, batch.run(case)))  # type: ignore[misc]
        assert answer is not None
        _say(case.name, *answer)


def main() -> None:
    """Judge every case named on standard input."""
    warnings.simplefilter("ignore")
    known = edge_core()
    names = [line.strip() for line in sys.stdin]
    for i in range(0, len(names), BATCH):
        judge([known[name] for name in names[i : i + BATCH]])


if __name__ == "__main__":
    main()
