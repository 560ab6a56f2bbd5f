"""Products of pairs of halves against float64, and what assembles of them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels import reference
from kernels.test_templates import conv_op

from cuda.emulation import Emulated
from cuda.test_cuda_templates import check, drawn, stored, transposed_op
from edgepipe.codegen.cuda import toolkit
from edgepipe.codegen.cuda.device import build_source
from edgepipe.kernels.cuda import pair_conv, pair_conv_transpose, pair_depthwise
from edgepipe.kernels.integer_ops import Limits, QConvOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, ConvTransposeOp, MatmulOp
from edgepipe.kernels.template import select
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target

pytestmark = pytest.mark.slow

TX2 = Target.load("jetson-tx2")
HALVES = Blocked(1, 200, 7, 7, 4, dtype="float16")
CODES = Blocked(1, 200, 7, 7, 200, dtype="int8")


def weights_of(op: Any, values: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """What a template packs, weights as ``op`` stores them, and the weights in float64."""
    transposed = isinstance(op, ConvTransposeOp)
    inputs = op.x.c if transposed else op.x.c // op.groups
    shape = (op.x.c, op.y.c) if transposed else (op.y.c, inputs)
    w = values.standard_normal((*shape, *op.kernel))
    w *= np.sqrt(2 / (inputs * op.kernel[0] * op.kernel[1]))
    b = values.standard_normal(op.y.c).astype(np.float32)
    if not op.weights.coded:
        stored = w.astype(np.float16)
        return [stored, b], stored.astype(np.float64)
    axis = 1 if transposed else 0
    others = tuple(i for i in range(4) if i != axis)
    scale = (np.abs(w).max(others, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(w / scale).astype(np.int8)
    return [codes, scale.reshape(-1), b], codes * scale.astype(np.float64)


def pair_ops() -> list[Any]:
    """Few, since the compiler for the emulation takes a second each; deep sums among them."""
    rng = random.Random(4)
    ops = [conv_op(rng, 4, kind) for kind in ("pointwise", "regular", "grouped", "depthwise")]
    deep = ConvOp(Blocked(1, 400, 3, 5, 4), Blocked(1, 24, 3, 5, 4), (1, 1))
    wide = ConvOp(Blocked(1, 8, 6, 7, 4, (2, 2, 2, 2)), Blocked(1, 8, 6, 7, 4), (5, 5),
                  offset=(2, 2), groups=8)  # fmt: skip
    image = ConvOp(Blocked(1, 3, 9, 8, 1, (1, 1, 1, 1)), Blocked(1, 22, 5, 4, 4), (3, 3), (2, 2),
                   offset=(1, 1))  # fmt: skip
    turned = [transposed_op(rng) for _ in range(2)]
    turned.append(dataclasses.replace(turned[0], x=dataclasses.replace(turned[0].x, c=40, lanes=4)))
    ops = [op for op in ops if op.x.lanes == 4] + [deep, wide, image, *turned]
    return [dataclasses.replace(stored(op, "float16"), weights=WeightFormat(kind))
            for op in ops for kind in ("float16", "int8")]  # fmt: skip


def test_pairs_of_halves(tmp_path: Path) -> None:
    values, ops = np.random.default_rng(1), pair_ops()
    kernels = Emulated(ops, TX2, tmp_path)
    names = {"pair_conv", "pair_depthwise", "pair_conv_transpose"}
    assert {t.name for t, _ in kernels.chosen} == names
    for op in ops:
        x = drawn(values, op.x)
        weights, w = weights_of(op, values)
        transposed = isinstance(op, ConvTransposeOp)
        convolve = reference.conv_transpose if transposed else reference.conv
        plain = convolve(x, w, weights[-1], op)
        check(op, kernels, plain, [op.x.pack(x)], weights, values)


def test_sums_of_pairs_do_not_stay_halves(tmp_path: Path) -> None:
    """Totals that were rounded to halves at every step would lose what the check asks for."""
    deep = ConvOp(Blocked(1, 4000, 1, 3, 4), Blocked(1, 4, 1, 3, 4), (1, 1))
    op = dataclasses.replace(stored(deep, "float16"), weights=WeightFormat("float16"))
    x, weights = np.ones((1, 4000, 1, 3), np.float16), np.ones((4, 4000, 1, 1), np.float16)
    kernels = Emulated([op], TX2, tmp_path)
    arrays = [weights, np.zeros(4, np.float32)]
    out = kernels.run(0, [op.x.pack(x)], arrays, [], op.y.elements, "float16")
    assert (op.y.unpack(out) == 4000).all()  # counting in halves stops at 2048


@pytest.mark.needs_cuda_toolkit
@pytest.mark.parametrize(("sm", "isa"), [(53, "6.5"), (62, "6.5"), (72, "7.4"), (87, "7.4")])
def test_pairs_assemble_without_spills(sm: int, isa: str) -> None:
    assert TX2.cuda is not None
    board = dataclasses.replace(TX2, cuda=dataclasses.replace(TX2.cuda, sm=sm, ptx_isa=isa))
    functions = {}
    for i, op in enumerate(pair_ops()):
        template = pair_conv_transpose.TEMPLATE
        if isinstance(op, ConvOp):
            template = pair_depthwise.TEMPLATE if op.groups == op.x.c else pair_conv.TEMPLATE
        functions[f"k{i}"] = template.emit(op, template.default(op, board))
    assert board.cuda is not None
    ptx = toolkit.to_ptx(build_source(functions, board).source, board.cuda)
    assert "fma.rn.f16x2" in ptx and f".version {isa}\n" in ptx
    _, resources = toolkit.to_cubin(ptx, board.cuda)
    assert set(functions) <= set(resources)  # phases are kernels of their own
    assert not any(found.spill_bytes for found in resources.values())


@pytest.mark.parametrize(
    ("op", "board", "name"),
    [
        (MatmulOp(1, 100, 40, 70, True), "jetson-tx2", "matmul"),
        (ConvOp(Blocked(1, 40, 9, 9, 4), Blocked(1, 70, 9, 9, 4), (1, 1)), "jetson-tx2", "conv"),
        (ConvOp(HALVES, HALVES, (1, 1), weights=WeightFormat("float16")), "jetson-tx2",
         "pair_conv"),
        (ConvOp(HALVES, HALVES, (1, 1), weights=WeightFormat("float16")), "jetson-agx-orin",
         "tensor_conv"),
        (QConvOp(CODES, CODES, (1, 1), Limits(-128, 127)), "jetson-agx-orin", "q_tensor_conv"),
        (ConvTransposeOp(Blocked(1, 24, 5, 5, 4), Blocked(1, 20, 10, 10, 4), (2, 2), (2, 2)),
         "jetson-tx2", "conv_transpose"),
    ],
)  # fmt: skip
def test_work_of_whole_tiles(op: Any, board: str, name: str) -> None:
    """More than what is asked for, by what fills the last tiles: whole ones."""
    target = Target.load(board)
    template, _ = select(op, target)
    assert template is not None and template.name == name
    knobs = template.default(op, target)
    executed = template.executed(op, knobs)
    assert op.macs < executed <= 8 * op.macs
    whole = knobs["tm"] * knobs["ty"] * knobs["tn"] * knobs["tx"] * knobs["k"]
    assert executed % whole == 0
