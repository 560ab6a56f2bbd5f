"""Kernels that LLVM's loop vectoriser compiled wrongly (TVM 0.27, LLVM 22, AVX-512)."""

from __future__ import annotations

import numpy as np
import onnx

from edgepipe.codegen import primfunc
from edgepipe.target import Target
from tests.lowering.running import run_model


def test_tile_with_power_of_two_modulo_is_right() -> None:
    x = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 18]>
        tile (float[2, 3, 4, 5] x) => (float[14, 18, 16, 10] y)
        <int64[4] repeats = {7, 6, 4, 2}> { y = Tile(x, repeats) }"""
    )
    np.testing.assert_array_equal(run_model(model, {"x": x})[0], np.tile(x, (7, 6, 4, 2)))


def test_loop_vectoriser_is_off() -> None:
    assert "vectorize-loops:bool=false" in str(primfunc.llvm_target(Target.load("host")))
