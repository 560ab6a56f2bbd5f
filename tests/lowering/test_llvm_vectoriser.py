"""Kernels that LLVM's loop vectoriser compiled wrongly (TVM 0.27, LLVM 22, AVX-512)."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest

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


_HALF = """
import onnx, onnx_ir
from edgepipe import codegen, lowering, passes
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.target import Target
context = Context(Target.load("wasm-simd"), Recipe())
for text in ("y = Celu(x)", "y = Mod<fmod=0>(x, x)"):
    head = '<ir_version: 9, opset_import: ["": 18]> g (float16[3,14] x) => (float16[3,14] y)'
    model = onnx_ir.from_proto(onnx.parser.parse_model(head + ' {' + text + '}'))
    codegen.generate(lowering.lower(passes.run(model, context), context), context, "m")
"""


@pytest.mark.slow
def test_half_precision_compiles_for_webassembly() -> None:
    # LLVM looped for ever on vectors of half there, whoever made them.
    subprocess.run([sys.executable, "-c", _HALF], check=True, timeout=120, capture_output=True)
