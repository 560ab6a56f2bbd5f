"""64-bit integers on 32-bit Arm: conversions that compiler-rt lacks there under LLVM's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepipe import pipeline

_MODEL = """<ir_version: 9, opset_import: ["": 18]>
g (int64[12] a, float[12] b) => (float[12] x, int64[12] y, int64[12] p) {
  x = Cast<to=1>(a)
  y = Cast<to=7>(b)
  two = Constant<value_int=2>()
  p = Pow(a, two)
}"""


@pytest.mark.slow
@pytest.mark.needs_qemu
def test_int64_conversions_are_exact_on_armv7(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(_MODEL), tmp_path / "m.onnx")
    a = np.array(
        [
            *(0, 1, -1, 123456789012, 12345 - 2**62, 2**53 + 1, 2**24 + 1, -(2**33) - 1),
            *(99999999, -5, 7, 2**40 + 3),
        ],
        np.int64,
    )
    b = np.array(
        [0.5, -1.5, 1e10, -1e12, 2**40, -(2**33), 3e9, -3e9, 7.99, 1e15, -0.1, 123456.7],
        np.float32,
    )
    bundle = pipeline.compile(
        tmp_path / "m.onnx", target="raspberry-pi-3-32", output=tmp_path / "bundle"
    )
    got = bundle.run({"a": a, "b": b})
    np.testing.assert_array_equal(got["x"], a.astype(np.float32))
    np.testing.assert_array_equal(got["y"], b.astype(np.int64))
    small = np.abs(a) < 2**26
    np.testing.assert_array_equal(got["p"][small], a[small] ** 2)
