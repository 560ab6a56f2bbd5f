"""Kernels that LLVM compiles wrongly, or for ever, if they are written as one first would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepipe import pipeline
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


@pytest.mark.parametrize("target", ["host", "raspberry-pi-5", "wasm-simd"])
def test_vectorisers_are_off(target: str) -> None:
    said = str(primfunc.llvm_target(Target.load(target)))
    assert "vectorize-loops:bool=false" in said and "vectorize-slp:bool=false" in said


_COMPILE = """
import sys, onnx, onnx_ir
from edgepipe import codegen, lowering, passes
from edgepipe.context import Context
from edgepipe.recipe import Recipe
from edgepipe.target import Target
target, *graphs = sys.argv[1:]
context = Context(Target.load(target), Recipe())
for graph in graphs:
    proto = onnx.parser.parse_model('<ir_version: 9, opset_import: ["": 18]> ' + graph)
    model = onnx_ir.from_proto(proto)
    codegen.generate(lowering.lower(passes.run(model, context), context), context, "m")
"""


def _ends(target: str, *graphs: str) -> None:
    """The SLP vectoriser, or what came of it, kept the compiler busy for ever with ``graphs``."""
    command = [sys.executable, "-c", _COMPILE, target, *graphs]
    subprocess.run(command, check=True, timeout=120, capture_output=True)


@pytest.mark.slow
def test_transpose_of_bytes_compiles() -> None:
    # Of all the rows tried, those of 66 bytes.
    form = "g (uint8[1,8,11,6] x) => (uint8[1,11,6,8] y)"
    _ends("host", form + " { y = Transpose<perm=[0,2,3,1]>(x) }")


@pytest.mark.slow
def test_half_precision_compiles_for_webassembly() -> None:
    of = "g (float16[3,14] x) => (float16[3,14] y)"
    _ends("wasm-simd", of + " { y = Celu(x) }", of + " { y = Mod<fmod=0>(x, x) }")


@pytest.mark.slow
@pytest.mark.needs_node
def test_shifts_of_bytes_for_webassembly(tmp_path: Path) -> None:
    # What the first leaves above the byte came back with the second.
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 18]> g (uint8[4, 5] x) => (uint8[4, 5] y) {
          z = BitShift<direction="LEFT">(x, x)
          y = BitShift<direction="RIGHT">(z, x) }"""
    )
    onnx.save(model, tmp_path / "model.onnx")
    bundle = pipeline.compile(tmp_path / "model.onnx", target="wasm-simd", output=tmp_path / "b")
    x = np.arange(20, dtype=np.uint8).reshape(4, 5) % 11
    (y,) = bundle.run({"x": x}, "node").values()
    np.testing.assert_array_equal(y, (x << x) >> x)
