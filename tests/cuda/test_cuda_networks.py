"""Whole networks in a GPU's formats: kernels executed on the CPU against the float model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cuda import stub
from edgepipe import pipeline
from edgepipe.bundle import Bundle
from edgepipe.gpu import VARIABLE
from edgepipe.validation import validate

pytestmark = [pytest.mark.slow, pytest.mark.needs_cuda_toolkit]


def executed(bundle: Bundle, folder: Path, patch: pytest.MonkeyPatch, least_db: float) -> None:
    """The bundle's own kernels agree with its reference, on the CPU."""
    library = stub.executing((bundle.path / "model.cu").read_text("utf-8"), folder)
    patch.setenv(VARIABLE, str(library))
    report = validate(bundle, min_snr_db=least_db, runner="cuda-local")
    assert report.ok, report
    assert validate(bundle, runner="cuda-local").ok
    assert not validate(bundle, min_snr_db=90, runner="cuda-local").ok


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("jetson-nano", "fp16"), ("jetson-nano", "w8a16"), ("jetson-orin-nano", "fp16")],
)
def test_halves_in_memory(
    target: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    bundle = pipeline.compile("digits", target=target, recipe=recipe, output=path)
    monkeypatch.setenv("STUB_CAPABILITY", "87")
    monkeypatch.setenv("STUB_DRIVER", "12060")
    single = pipeline.compile("digits", target="jetson-nano", output=tmp_path / "single")
    # Tiles of tensor cores hold more weights of zero.
    for part in ("weights_bytes", "arena_bytes") if target == "jetson-nano" else ("arena_bytes",):
        assert bundle.manifest["memory"][part] < 0.6 * single.manifest["memory"][part]
    executed(bundle, tmp_path, monkeypatch, 45)


ATTENTION = """<ir_version: 8, opset_import: ["" : 18]>
attention (float[1,21,32] x) => (float[1,21,32] y)
  <float[32,96] qkv, float[96] b, float[32,32] out, float[32] gain, float[32] bias, float[1] root,
   int64[5] split = {1,21,3,4,8}, int64[3] joined = {1,21,32},
   int64[1] q = {0}, int64[1] k = {1}, int64[1] v = {2}, int64[1] end = {3}, int64[1] axis = {2}> {
  n = LayerNormalization(x, gain, bias)
  m = MatMul(n, qkv)
  a = Add(m, b)
  r = Reshape(a, split)
  q5 = Slice(r, q, k, axis) k5 = Slice(r, k, v, axis) v5 = Slice(r, v, end, axis)
  q4 = Squeeze(q5, axis) k4 = Squeeze(k5, axis) v4 = Squeeze(v5, axis)
  qt = Transpose<perm=[0,2,1,3]>(q4)
  kt = Transpose<perm=[0,2,3,1]>(k4)
  vt = Transpose<perm=[0,2,1,3]>(v4)
  ks = Mul(kt, root)
  s = MatMul(qt, ks)
  p = Softmax(s)
  c = MatMul(p, vt)
  t = Transpose<perm=[0,2,1,3]>(c)
  u = Reshape(t, joined)
  o = MatMul(u, out)
  y = Add(o, x)
}"""


def attention(folder: Path) -> Path:
    """Self-attention of four heads, 21 tokens (no whole vectors) of 32 numbers."""
    model, values = onnx.parser.parse_model(ATTENTION), np.random.default_rng(11)
    drawn = {
        "qkv": values.standard_normal((32, 96)) / np.sqrt(32), "b": values.standard_normal(96),
        "out": values.standard_normal((32, 32)) / np.sqrt(32), "gain": np.ones(32),
        "bias": values.standard_normal(32), "root": np.full(1, 8**-0.5),
    }  # fmt: skip
    fixed = [t for t in model.graph.initializer if t.name not in drawn]
    del model.graph.initializer[:]
    given = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in drawn.items()]
    model.graph.initializer.extend([*fixed, *given])
    onnx.save(model, folder / "attention.onnx")
    return folder / "attention.onnx"


@pytest.mark.parametrize(
    ("target", "recipe", "names"),
    [
        ("jetson-tx2", "fp16", {"pair_dense", "pair_matmul"}),
        ("jetson-tx2", "w8a16", {"pair_dense", "pair_matmul"}),
        ("jetson-orin-nx", "fp16", {"tensor_dense", "tensor_matmul"}),
    ],
)
def test_attention_in_halves(
    target: str, recipe: str, names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bundle"
    bundle = pipeline.compile(attention(tmp_path), target=target, recipe=recipe, output=path)
    products = [k for k in bundle.manifest["kernels"] if k["macs"]]
    assert {k["kernel"].rpartition("_")[0] for k in products} == names
    assert all(k["arithmetic"].startswith("float16") for k in products)
    monkeypatch.setenv("STUB_CAPABILITY", "87")
    monkeypatch.setenv("STUB_DRIVER", "12060")
    executed(bundle, tmp_path, monkeypatch, 45 if recipe == "fp16" else 35)  # 8-bit weights


def test_codes_in_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bundle"
    bundle = pipeline.compile("digits", target="jetson-orin-nano", recipe="w8a8", output=path)
    products = [k for k in bundle.manifest["kernels"] if k["macs"]]
    assert products
    assert {(k["arithmetic"], k["accumulator"]) for k in products} == {("int8", "int32")}
    monkeypatch.setenv("STUB_CAPABILITY", "87")
    monkeypatch.setenv("STUB_DRIVER", "12060")
    text = (path / "model.cu").read_text("utf-8")
    for right, source in [(True, text), (False, text.replace("__float2int_rn(", "(int)("))]:
        folder = tmp_path / str(right)
        folder.mkdir()
        monkeypatch.setenv(VARIABLE, str(stub.executing(source, folder)))
        assert validate(bundle, runner="cuda-local").ok is right
