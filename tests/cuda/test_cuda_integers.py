"""CUDA templates over codes: the tests of the CPU's, code by code, on signed codes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels import test_integer_templates as cpu

from cuda.emulation import Emulated
from edgepipe.codegen.cuda import toolkit
from edgepipe.codegen.cuda.device import build_source
from edgepipe.kernels.integer_ops import QConvOp
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
    template = "q_depthwise" if kind == "depthwise" else "q_conv"
    refused = [f"{template}: sm_62 has no dot product of bytes"]
    assert select(products[0], tx2) == (None, refused)


def test_products_of_two_tensors(on_cuda: type[Signed], tmp_path: Path) -> None:
    cpu.test_product_of_two_activations(XAVIER, tmp_path)
    assembled(on_cuda.made[:2], 72, "7.4")


@pytest.mark.parametrize("test", [cpu.test_sums_products_and_tables, cpu.test_pooling])
def test_elementwise(test: Any, on_cuda: type[Signed], tmp_path: Path) -> None:
    test(tmp_path)
    assembled(on_cuda.made, 72, "7.4")


@pytest.mark.parametrize("c", [1, 3, 16, 19])
def test_quantisation_and_copies(c: int, on_cuda: type[Signed], tmp_path: Path) -> None:
    cpu.test_quantisation_and_copies(c, tmp_path)
    assert on_cuda.made


def test_rounding_once_is_noticed(on_cuda: type[Signed], tmp_path: Path) -> None:
    """A conversion that cuts instead of rounding must not pass."""
    on_cuda.edit = staticmethod(lambda text: text.replace("__float2int_rn(", "(int)("))
    with pytest.raises(AssertionError):
        cpu.test_convolution("pointwise", XAVIER, 127, tmp_path)
