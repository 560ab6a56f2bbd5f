"""CUDA templates over codes: the tests of the CPU's, code by code, on signed codes."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels import test_integer_templates as cpu

from cuda.emulation import Emulated
from edgepipe.codegen.cuda import toolkit
from edgepipe.codegen.cuda.device import build_source
from edgepipe.kernels.cuda import tensor_qconv
from edgepipe.kernels.integer_ops import Limits, QConvOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.template import select
from edgepipe.target import Target

pytestmark = pytest.mark.slow

XAVIER = Target.load("jetson-xavier-nx")


def signed(value: Any) -> Any:
    """An op, layout or array over uint8 as the same over int8, 128 less."""
    if isinstance(value, np.ndarray):
        return (value.astype(np.int16) - 128).astype(np.int8) if value.dtype == np.uint8 else value
    if isinstance(value, Blocked) and value.dtype == "uint8":
        return dataclasses.replace(value, dtype="int8", zero=value.zero - 128)
    if isinstance(value, tuple):
        return tuple(map(signed, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Blocked):
        fields = {f.name: signed(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


class Signed:
    """CUDA kernels with the interface of ``Kernels``; ``made`` are all ops built so far."""

    made: list[Any]
    edit = staticmethod(str)

    def __init__(self, ops: list[Any], target: Target, folder: Path) -> None:
        self.ops = [signed(op) for op in ops]
        type(self).made += self.ops
        self.kernels = Emulated(self.ops, XAVIER, folder, type(self).edit)

    def run(self, index, inputs, weights, residuals, elements, dtype="float32"):
        arrays = ([signed(a) for a in part] for part in (inputs, weights, residuals))
        codes = dtype == "uint8"
        out = self.kernels.run(index, *arrays, elements, "int8" if codes else dtype)
        return (out.astype(np.int16) + 128).astype(np.uint8) if codes else out


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> type[Signed]:
    kind = type("Kernels", (Signed,), {"made": []})
    monkeypatch.setattr(cpu, "Kernels", kind)
    return kind


def assembled(ops: list[Any], sm: int, isa: str) -> None:
    """``ops`` as machine code of one GPU, nothing of it spilled."""
    assert XAVIER.cuda is not None
    board = dataclasses.replace(XAVIER, cuda=dataclasses.replace(XAVIER.cuda, sm=sm, ptx_isa=isa))
    assert board.cuda is not None
    functions = {}
    for i, op in enumerate(ops):
        template, _ = select(op, board)
        assert template is not None
        functions[f"k{i}"] = template.emit(op, template.default(op, board))
    ptx = toolkit.to_ptx(build_source(functions, board).source, board.cuda)
    _, resources = toolkit.to_cubin(ptx, board.cuda)
    assert set(functions) <= set(resources)
    assert not any(kernel.spill_bytes for kernel in resources.values())


@pytest.mark.parametrize("kind", ["pointwise", "regular", "grouped", "depthwise"])
def test_convolution(kind: str, on_cuda: type[Signed], tmp_path: Path) -> None:
    cpu.test_convolution(kind, XAVIER, 127, tmp_path)
    products = [op for op in on_cuda.made if isinstance(op, QConvOp)]
    assembled(products[:3], 72, "7.4")
    assembled(products[:3], 87, "7.4")
    tx2 = Target.load("jetson-tx2")
    assembled([op for op in products if op.y.c > 16][:2], 72, "7.4")
    wide = select(max(products, key=lambda op: op.y.c), XAVIER)[0]
    on_tensor_cores = kind in ("pointwise", "regular")
    assert wide is not None and (wide.name == "q_tensor_conv") is on_tensor_cores
    template = "q_depthwise" if kind == "depthwise" else "q_conv"
    refused = [f"{template}: sm_62 has no dot product of bytes"]
    assert select(products[0], tx2) == (None, refused)


def test_squares_of_bytes_have_the_bits_of_dot_products(tmp_path: Path) -> None:
    """Several tiles, each setting, and no last step that is full; against exact sums."""
    values = np.random.default_rng(3)
    x = Blocked(1, 36, 9, 11, 36, (1, 1, 1, 1), "int8", 5)
    y = Blocked(1, 70, 9, 11, 70, dtype="float32")
    op = QConvOp(x, y, (3, 3), Limits(-np.inf, np.inf), offset=(1, 1))
    template, _ = select(op, XAVIER)
    assert template is tensor_qconv.TEMPLATE
    settings = template.settings(op, XAVIER)
    drawn = [settings[0], *random.Random(1).sample(settings[1:], 2)]
    kernels = Emulated([op] * 3, XAVIER, tmp_path, settings=drawn)
    codes = values.integers(-128, 128, (1, 36, 9, 11)).astype(np.int8)
    w = values.integers(-127, 128, (70, 36, 3, 3)).astype(np.int8)
    bias, ones = values.integers(-999, 999, 70).astype(np.int32), np.ones(70, np.float32)
    padded = np.pad(codes.astype(np.int64) - 5, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    exact = np.einsum("nchwij,ocij->nohw", windows, w.astype(np.int64)) + bias[:, None, None]
    for i in range(len(drawn)):
        out = kernels.run(i, [x.pack(codes)], [w, bias, ones], [], y.elements)
        assert np.array_equal(y.unpack(out), exact.astype(np.float32)), drawn[i]
        assert not np.array_equal(y.unpack(out), np.roll(exact, 1, 1).astype(np.float32))


@pytest.mark.needs_cuda_toolkit
@pytest.mark.parametrize(("sm", "isa"), [(72, "7.4"), (87, "7.4")])
def test_squares_of_bytes_assemble(sm: int, isa: str) -> None:
    assert XAVIER.cuda is not None
    cuda = dataclasses.replace(XAVIER.cuda, sm=sm, ptx_isa=isa)
    board = dataclasses.replace(XAVIER, cuda=cuda)
    x = Blocked(1, 128, 28, 28, 128, (1, 1, 1, 1), "int8")
    op = QConvOp(x, dataclasses.replace(x, pads=(0, 0, 0, 0)), (3, 3), Limits(-128, 127),
                 offset=(1, 1))  # fmt: skip
    template, _ = select(op, board)
    assert template is tensor_qconv.TEMPLATE
    settings = template.settings(op, board)
    functions = {f"k{i}": template.emit(op, knobs) for i, knobs in enumerate(settings)}
    ptx = toolkit.to_ptx(build_source(functions, board).source, cuda)
    assert "wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32" in ptx
    _, resources = toolkit.to_cubin(ptx, cuda)
    assert len(resources) == len(settings)
    assert not any(found.spill_bytes for found in resources.values())


def test_products_of_two_tensors(on_cuda: type[Signed], tmp_path: Path) -> None:
    cpu.test_product_of_two_activations(XAVIER, tmp_path)
    assembled(on_cuda.made[:2], 72, "7.4")


@pytest.mark.parametrize("test", [cpu.test_sums_products_and_tables, cpu.test_pooling])
def test_elementwise(test: Any, on_cuda: type[Signed], tmp_path: Path) -> None:
    test(tmp_path)
    assembled(on_cuda.made, 72, "7.4")


@pytest.mark.parametrize("c", [1, 19, 40])
def test_bilinear_resizing(c: int, on_cuda: type[Signed], tmp_path: Path) -> None:
    cpu.test_bilinear_resizing(c, tmp_path)
    assembled(on_cuda.made[:3], 72, "7.4")


@pytest.mark.parametrize("c", [1, 3, 16, 19])
def test_quantisation_and_copies(c: int, on_cuda: type[Signed], tmp_path: Path) -> None:
    cpu.test_quantisation_and_copies(c, tmp_path)
    assert on_cuda.made


def test_rounding_once_is_noticed(on_cuda: type[Signed], tmp_path: Path) -> None:
    """A conversion that cuts instead of rounding must not pass."""
    on_cuda.edit = staticmethod(lambda text: text.replace("__float2int_rn(", "(int)("))
    with pytest.raises(AssertionError):
        cpu.test_convolution("pointwise", XAVIER, 127, tmp_path)
