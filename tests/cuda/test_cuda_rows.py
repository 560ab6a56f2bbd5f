"""Row-major kernels with halves in memory, against float64: in pairs and on tensor cores."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels.harness import snr_db

from cuda.emulation import Emulated
from edgepipe.codegen.cuda import toolkit
from edgepipe.codegen.cuda.device import build_source
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.ops import LayerNormOp, MatmulOp, SoftmaxOp
from edgepipe.kernels.template import select
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target

pytestmark = pytest.mark.slow

TX2, XAVIER = Target.load("jetson-tx2"), Target.load("jetson-xavier-nx")
#: Sums of up to 16 products in halves; one rounding of the result.
LEAST_SNR_DB = 60
HALF, CODES = WeightFormat("float16"), WeightFormat("int8")
GELU, ADD = Step("gelu"), Step("add")

DENSE = MatmulOp(1, 37, 96, 70, True, True, weights=HALF, a_dtype="float16", y_dtype="float16")
COMPUTED = MatmulOp(3, 19, 37, 50, False, b_batched=True, a_dtype="float16", b_dtype="float16",
                    y_dtype="float16")  # fmt: skip
PRODUCTS = [
    DENSE,
    dataclasses.replace(DENSE, k=43, n=33, y_dtype="float32"),
    dataclasses.replace(DENSE, epilogue=(ADD,), residuals=("full",), residual_dtypes=("float16",)),
    dataclasses.replace(DENSE, m=1, epilogue=(ADD, ADD), residuals=("full", "row"),
                        residual_dtypes=("float16", "float32")),
    COMPUTED,
    dataclasses.replace(COMPUTED, k=64, a_batched=False),
    dataclasses.replace(COMPUTED, b_batched=False, b_dtype="float32", y_dtype="float32"),
]  # fmt: skip
CODED = [dataclasses.replace(DENSE, weights=CODES), dataclasses.replace(DENSE, k=42, weights=CODES)]


def product(op: MatmulOp, kernels: Emulated, values: np.random.Generator) -> None:
    def drawn(shape: tuple[int, ...], dtype: str) -> np.ndarray:
        return values.standard_normal(shape).astype(dtype)

    a = drawn((op.batch if op.a_batched else 1, op.m, op.k), op.a_dtype)
    shape = (op.k, op.n) if op.constant else (op.batch if op.b_batched else 1, op.k, op.n)
    kind = "float16" if op.constant else op.b_dtype
    w = (values.standard_normal(shape) / np.sqrt(op.k)).astype(kind)
    weights = [w]
    if op.weights.coded:
        scale = (np.abs(w).max(0) / 127).astype(np.float32)
        weights = [np.rint(w / scale).astype(np.int8), scale]
        w = weights[0] * scale.astype(np.float64)
    bias = [drawn((op.n,), "float32")] if op.bias else []
    sizes = {"full": (op.batch, op.m, op.n), "row": (op.n,)}
    pairs = zip(op.residuals, op.residual_dtypes, strict=True)
    residuals = [drawn(sizes[kind], dtype) for kind, dtype in pairs]
    expected = a.astype(np.float64) @ w.astype(np.float64) + sum(bias)
    expected = expected + sum(r.astype(np.float64) for r in residuals)
    inputs, packed = ([a], [*weights, *bias]) if op.constant else ([a, w], [])
    index, count = kernels.ops.index(op), op.batch * op.m * op.n
    got = kernels.run(index, inputs, packed, residuals, count, op.y_dtype).reshape(expected.shape)
    assert snr_db(expected, got) > LEAST_SNR_DB, op
    assert snr_db(expected, np.roll(got, 1, -1)) < 10  # positive control: columns moved


@pytest.mark.parametrize(
    ("target", "ops", "names"),
    [
        (TX2, [*PRODUCTS, *CODED], {"pair_matmul", "gemv", "matmul"}),
        (XAVIER, [*PRODUCTS, *CODED], {"tensor_matmul", "pair_matmul", "gemv", "matmul"}),
    ],
    ids=["pairs", "tensor-cores"],
)
def test_products(target: Target, ops: list[MatmulOp], names: set[str], tmp_path: Path) -> None:
    values, kernels = np.random.default_rng(3), Emulated(list(ops), target, tmp_path)
    assert {template.name for template, _ in kernels.chosen} == names
    for op in ops:
        product(op, kernels, values)


def test_sums_do_not_stay_halves(tmp_path: Path) -> None:
    """Totals that were rounded to halves at every step would stop counting at 2048."""
    op = dataclasses.replace(DENSE, m=3, k=4000, n=8, bias=False, y_dtype="float32")
    kernels = Emulated([op], TX2, tmp_path)
    ones = np.ones((4000, 8), np.float16)
    got = kernels.run(0, [np.ones((3, 4000), np.float16)], [ones], [], 24)
    assert (got == 4000).all()


def test_softmax_and_layer_norm(tmp_path: Path) -> None:
    types = [("float16", "float16"), ("float32", "float16"), ("float16", "float32")]
    ops: list[Any] = [SoftmaxOp(5, 197, *each) for each in types]
    ops += [LayerNormOp(5, 197, 1e-5, True, *each) for each in types]
    kernels, values = Emulated(ops, TX2, tmp_path), np.random.default_rng(5)
    scale, bias = values.standard_normal((2, 197)).astype(np.float32)
    for i, op in enumerate(ops):
        x = (3 * values.standard_normal((5, 197))).astype(op.x_dtype)
        wide = x.astype(np.float64)
        if isinstance(op, SoftmaxOp):
            raised = np.exp(wide - wide.max(-1, keepdims=True))
            expected, weights = raised / raised.sum(-1, keepdims=True), []
        else:
            centred = wide - wide.mean(-1, keepdims=True)
            spread = np.sqrt((centred**2).mean(-1, keepdims=True) + op.epsilon)
            expected, weights = centred / spread * scale + bias, [scale, bias]
        got = kernels.run(i, [x], weights, [], x.size, op.y_dtype).reshape(x.shape)
        assert snr_db(expected, got) > (65 if op.y_dtype == "float16" else 110), op
        assert snr_db(expected, np.roll(got, 1, -1)) < 10


@pytest.mark.needs_cuda_toolkit
@pytest.mark.parametrize(("sm", "isa"), [(53, "6.5"), (62, "6.5"), (72, "7.4"), (87, "7.4")])
def test_products_assemble_without_spills(sm: int, isa: str) -> None:
    assert TX2.cuda is not None
    board = dataclasses.replace(TX2, cuda=dataclasses.replace(TX2.cuda, sm=sm, ptx_isa=isa))
    functions = {}
    wide = dataclasses.replace(DENSE, m=197, k=192, n=768, epilogue=(GELU,))
    for i, op in enumerate([*PRODUCTS, *CODED, wide]):
        template, _ = select(op, board)
        assert template is not None
        own = template.default(op, board)
        for j, knobs in enumerate(template.settings(op, board) if op is DENSE else [own]):
            functions[f"k{i}_{j}"] = template.emit(op, knobs)
    assert board.cuda is not None
    source = build_source(functions, board).source
    _, ptx, _, resources = toolkit.assemble(source, board.cuda)
    assert ("wmma.mma" in ptx) is (sm >= 70) and f".version {isa}\n" in ptx
    assert len(resources) == len(functions)
    assert not any(found.spill_bytes for found in resources.values())
