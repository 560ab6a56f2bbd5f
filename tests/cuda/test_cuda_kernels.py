"""CUDA kernels without a GPU: their own source runs on the CPU, and assembles for each sm."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels.harness import snr_db

from cuda.emulation import Emulated
from cuda.test_cuda_templates import stored
from edgepipe.codegen.cuda import toolkit
from edgepipe.codegen.cuda.device import build_source
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import (
    ConvOp,
    ConvTransposeOp,
    GlobalPoolOp,
    LayerNormOp,
    MatmulOp,
    Op,
    PoolOp,
    RelayoutOp,
    SoftmaxOp,
)
from edgepipe.kernels.template import select
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target

pytestmark = pytest.mark.slow

TX2 = Target.load("jetson-tx2")
BORDER = (1, 1, 1, 1)
#: float32 sums in another order than the reference's.
LEAST_SNR_DB = 120
X = Blocked(1, 16, 9, 7, 4, BORDER)
CONV = ConvOp(X, Blocked(1, 22, 9, 7, 4, BORDER), (3, 3), offset=(1, 1), epilogue=(Step("relu"),))
OPS: dict[str, Op] = {
    "conv": CONV,
    "image": dataclasses.replace(
        CONV, x=Blocked(1, 3, 9, 7, 1, BORDER), y=Blocked(1, 22, 5, 4, 4), strides=(2, 2)
    ),
    "pointwise": dataclasses.replace(
        CONV, kernel=(1, 1), offset=(0, 0), epilogue=(Step("add"), Step("sigmoid")),
        residuals=(Blocked(1, 22, 9, 7, 4),),
    ),
    "halves": dataclasses.replace(CONV, weights=WeightFormat("float16")),
    "grouped": dataclasses.replace(CONV, y=Blocked(1, 16, 9, 7, 4), groups=2),
    "depthwise": dataclasses.replace(CONV, y=Blocked(1, 16, 9, 7, 4), groups=16),
    "transposed": ConvTransposeOp(
        X, Blocked(1, 22, 18, 14, 4, BORDER), (3, 3), (2, 2), offset=(1, 1)
    ),
    "pool": PoolOp("max", X, Blocked(1, 16, 5, 4, 4), (3, 3), (2, 2), offset=(1, 1)),
    "global": GlobalPoolOp("average", X, Blocked(1, 16, 1, 1, 4)),
    "relayout": RelayoutOp(Blocked(1, 6, 5, 5, 1), Blocked(1, 6, 5, 5, 4, BORDER)),
    "dense": MatmulOp(1, 1, 19, 10, True, bias=True),
    "matmul": MatmulOp(2, 5, 7, 9, False, b_batched=True),
    "softmax": SoftmaxOp(3, 150),
    "layer_norm": LayerNormOp(3, 150, 1e-5),
}  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    return Emulated(list(OPS.values()), TX2, tmp_path_factory.mktemp("cuda"))


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def convolved(kernels: Emulated, name: str) -> tuple[np.ndarray, np.ndarray]:
    """What the emulated kernel and torch give for the same random numbers."""
    op = OPS[name]
    assert isinstance(op, ConvOp)
    x = normal(1, op.x.c, op.x.h, op.x.w)
    weight = normal(op.y.c, op.x.c // op.groups, *op.kernel)
    weight = weight.astype(np.float16 if name == "halves" else np.float32)
    bias, residuals = normal(op.y.c), [normal(1, r.c, r.h, r.w) for r in op.residuals]
    packed = [layout.pack(r) for layout, r in zip(op.residuals, residuals, strict=True)]
    index = list(OPS).index(name)
    got = kernels.run(index, [op.x.pack(x)], [weight, bias], packed, op.y.elements)
    wide = [torch.from_numpy(a.astype(np.float64)) for a in (x, weight, bias, *residuals)]
    wanted = F.conv2d(*wide[:3], op.strides, op.offset, op.dilations, op.groups)
    wanted = torch.sigmoid(wanted + wide[3]) if residuals else wanted.relu()
    assert np.array_equal(op.y.pack(op.y.unpack(got)), got.reshape(op.y.shape)) or op.y.c % 4
    return op.y.unpack(got), wanted.numpy()


@pytest.mark.parametrize("name", ["conv", "image", "pointwise", "halves", "grouped", "depthwise"])
def test_convolutions_with_border_and_epilogue(emulated: Emulated, name: str) -> None:
    got, wanted = convolved(emulated, name)
    assert snr_db(wanted, got) > LEAST_SNR_DB
    assert snr_db(wanted, got[:, [1, 0, *range(2, got.shape[1])]]) < 20


def test_pooling_and_relayout(emulated: Emulated) -> None:
    x, names = normal(1, 16, 9, 7), list(OPS)
    y = OPS["pool"].y
    got = emulated.run(names.index("pool"), [X.pack(x)], [], [], y.elements)
    assert np.array_equal(y.unpack(got), F.max_pool2d(torch.from_numpy(x), 3, 2, 1).numpy())
    y = OPS["global"].y
    got = emulated.run(names.index("global"), [X.pack(x)], [], [], y.elements)
    wanted = x.astype(np.float64).mean((2, 3), keepdims=True)
    assert snr_db(wanted, y.unpack(got)) > LEAST_SNR_DB
    x, y = normal(1, 6, 5, 5), OPS["relayout"].y
    got = emulated.run(names.index("relayout"), [x], [], [], y.elements)
    assert np.array_equal(got.reshape(y.shape), y.pack(x))


def test_rows_and_products(emulated: Emulated) -> None:
    names = list(OPS)
    a, w, b = normal(1, 19), normal(19, 10), normal(10)
    got = emulated.run(names.index("dense"), [a], [w, b], [], 10)
    assert snr_db((a.astype(np.float64) @ w + b).ravel(), got) > LEAST_SNR_DB
    a, w = normal(2, 5, 7), normal(2, 7, 9)
    got = emulated.run(names.index("matmul"), [a, w], [], [], 90)
    assert snr_db((a.astype(np.float64) @ w).ravel(), got) > LEAST_SNR_DB
    x, s, b = normal(3, 150), normal(150), normal(150, 1).ravel()
    wide = torch.from_numpy(x).double()
    got = emulated.run(names.index("softmax"), [x], [], [], x.size)
    assert snr_db(torch.softmax(wide, -1).numpy().ravel(), got) > LEAST_SNR_DB
    got = emulated.run(names.index("layer_norm"), [x], [s, b], [], x.size)
    wanted = F.layer_norm(
        wide, (150,), torch.from_numpy(s).double(), torch.from_numpy(b).double()
    ).numpy()
    assert snr_db(wanted.ravel(), got) > LEAST_SNR_DB


def test_the_emulation_notices_a_missing_barrier(tmp_path: Path) -> None:
    broken = Emulated(
        list(OPS.values()), TX2, tmp_path, lambda text: text.replace("__syncthreads();", "")
    )
    got, wanted = convolved(broken, "conv")
    assert not snr_db(wanted, got) > 20


@pytest.mark.needs_cuda_toolkit
@pytest.mark.parametrize(("sm", "isa"), [(53, "6.5"), (62, "6.5"), (72, "7.4"), (87, "7.4")])
def test_kernels_assemble_without_spills(sm: int, isa: str) -> None:
    assert TX2.cuda is not None
    board = dataclasses.replace(TX2, cuda=dataclasses.replace(TX2.cuda, sm=sm, ptx_isa=isa))
    halves = {f"{name}_half": stored(op, "float16") for name, op in OPS.items() if hasattr(op, "y")}
    functions = {}
    for name, op in {**OPS, **halves}.items():
        template, _ = select(op, board)
        assert template is not None
        functions[name] = template.emit(op, template.default(op, board))
    assert board.cuda is not None
    ptx = toolkit.to_ptx(build_source(functions, board).source, board.cuda)
    assert f".version {isa}\n" in ptx
    cubin, resources = toolkit.to_cubin(ptx, board.cuda)
    assert cubin.startswith(b"\x7fELF") and set(functions) <= set(resources)
    assert not any(kernel.spill_bytes for kernel in resources.values())
