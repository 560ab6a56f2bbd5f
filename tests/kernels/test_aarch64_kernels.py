"""Kernels as Arm alone has them, run by QEMU: the default rule's against NumPy, and other
settings, those of records from before its knobs included, against the default's bits."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.kernels import qconv, qimage
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.integer_ops import Limits, QConvOp, QTableOp, Residual
from edgepipe.kernels.layout import Blocked, Pads
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.template import select
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target
from tests.kernels import reference, test_integer_templates, test_templates
from tests.kernels.harness import Emulated
from tests.kernels.test_weight_formats import stored

pytestmark = pytest.mark.needs_qemu

PI4, PI5 = Target.load("raspberry-pi-4"), Target.load("raspberry-pi-5")
NONE: Pads = (0, 0, 0, 0)
AROUND: Pads = (1, 1, 1, 1)
#: What records from before these knobs do not name.
YOUNG = {
    "conv": ("unroll", "by_row", "pairs", "rest"),
    "depthwise": ("pairs",),
    "q_conv": ("apart", "rest"),
}


def pointwise(
    c: int, co: int, h: int, w: int, pads: Pads = AROUND, epilogue: tuple[Step, ...] = (),
    residuals: tuple[Blocked, ...] = (), n: int = 1, strides: tuple[int, int] = (1, 1),
) -> ConvOp:  # fmt: skip
    x = Blocked(n, c, (h - 1) * strides[0] + 1, (w - 1) * strides[1] + 1, 4)
    y = Blocked(n, co, h, w, 4, pads)
    return ConvOp(x, y, (1, 1), strides, epilogue=epilogue, residuals=residuals)


def window(
    c: int, co: int, h: int, w: int, kernel: tuple[int, int], stride: int = 1, pads: Pads = AROUND,
    groups: int = 1, lanes: int = 4, dilation: int = 1, epilogue: tuple[Step, ...] = (),
    residuals: tuple[Blocked, ...] = (),
) -> ConvOp:  # fmt: skip
    """With a border of the input above and to the left, as wide as the kernel reaches."""
    need = [(s - 1) * stride + (k - 1) * dilation + 1 for s, k in zip((h, w), kernel, strict=True)]
    x = Blocked(1, c, need[0] - 1, need[1] - 1, lanes, (1, 1, 0, 0))
    y = Blocked(1, co, h, w, 4, pads)
    steps = epilogue or (Step("relu"),)
    return ConvOp(x, y, kernel, (stride, stride), (dilation, dilation), (1, 1), groups, steps,
                  residuals)  # fmt: skip


ADDED = Blocked(1, 32, 5, 13, 4)
RELU = (Step("relu"),)
CONVOLUTIONS: list[Op] = [
    # Two blocks per iteration and one; tiles that end rows at even pixels, at odd ones, twice.
    pointwise(48, 32, 4, 14, epilogue=RELU),
    pointwise(24, 32, 5, 13, (1, 2, 0, 1)),
    pointwise(40, 8, 7, 7, n=2),
    pointwise(44, 16, 3, 3, (0, 0, 1, 1)),
    # An odd number of blocks, a last tile of one pixel, far borders, rows as wide as a tile.
    pointwise(20, 16, 1, 7, epilogue=RELU),
    pointwise(48, 32, 2, 70),
    pointwise(48, 16, 9, 12),
    # What is added, as large as the output and one value per channel.
    pointwise(32, 32, 5, 13, NONE, (Step("add"), Step("clip", (0.0, 6.0))), (ADDED,)),
    pointwise(32, 32, 5, 13, AROUND, (Step("add"), Step("mul")),
              (ADDED, Blocked(1, 32, 1, 1, 4))),
    pointwise(32, 16, 5, 6, AROUND, RELU, strides=(2, 2)),
    pointwise(48, 16, 5, 7, AROUND, RELU, strides=(2, 2)),
    window(8, 16, 5, 13, (3, 3), 2),
    window(16, 16, 4, 9, (3, 3), groups=2),
    # Images: strides, dilations, a last tile whose rows do not fill a vector, one channel.
    window(3, 32, 5, 16, (3, 3), 2, lanes=1),
    window(3, 32, 5, 31, (3, 3), lanes=1),
    window(3, 16, 3, 13, (3, 1), lanes=1, pads=(0, 1, 0, 0)),
    window(3, 16, 4, 9, (2, 3), 2, lanes=1, dilation=2),
    window(1, 16, 4, 9, (3, 3), 2, lanes=1),
    window(3, 16, 4, 9, (7, 7), 2, lanes=1),
    window(3, 16, 4, 9, (4, 5), lanes=1),
    window(3, 16, 3, 2, (5, 1), lanes=1),
    # By Winograd's.
    window(32, 48, 14, 14, (3, 3)),
    window(32, 32, 7, 7, (3, 3)),
    window(32, 36, 28, 30, (3, 3)),
    window(36, 32, 4, 50, (3, 3), pads=NONE),
]  # fmt: skip
DEPTHWISE: list[Op] = [
    window(8, 8, 6, 14, (3, 3), groups=8),
    window(8, 8, 6, 56, (3, 3), groups=8, pads=NONE),
    window(8, 8, 7, 33, (3, 3), groups=8),
    window(8, 8, 5, 29, (3, 3), 2, groups=8),
    window(8, 8, 1, 56, (3, 3), 2, groups=8, pads=NONE),
    window(8, 8, 5, 30, (5, 3), groups=8, dilation=2),
    window(8, 8, 4, 16, (3, 3), 3, groups=8),
    window(8, 8, 5, 70, (3, 3), groups=8, epilogue=(Step("add"), *RELU),
           residuals=(Blocked(1, 8, 5, 70, 4, (0, 1, 0, 2)),)),
]  # fmt: skip


def alternatives(op: Any, target: Target) -> list[dict[str, Any]]:
    """The default rule's knobs, those without what it names alone, and a few others."""
    template, reasons = select(op, target)
    assert template is not None, reasons
    default, others = template.default(op, target), template.settings(op, target)[1:]
    before = {k: v for k, v in default.items() if k not in YOUNG.get(template.name, ())}
    return [default, before, *random.Random(str(op)).sample(others, min(3, len(others)))]


def drawn(op: ConvOp, rng: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray], Any]:
    """Packed input, weights as ``pack`` takes them, and the float64 sums."""
    x = test_templates.data(rng, op.x)
    shape = (op.y.c, op.x.c // op.groups, *op.kernel)
    w = (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)
    b = rng.standard_normal(op.y.c).astype(np.float32)
    weights, value = [w], w.astype(np.float64)
    if not op.weights.plain:
        weights, value = stored(rng, op.weights, w, 0, 1)
    return [op.x.pack(x)], [*weights, b], reference.conv(x, value, b, op)


def check_all(ops: list[Op], folder: Path) -> None:
    """All alternatives of every op come to the same bits, the first one's right."""
    every = [(op, knobs) for op in ops for knobs in alternatives(op, PI4)]
    kernels = Emulated([op for op, _ in every], PI4, folder, [knobs for _, knobs in every])
    for op in ops:
        assert isinstance(op, ConvOp)
        values = np.random.default_rng(3)
        inputs, weights, plain = drawn(op, values)
        residuals = [r.pack(test_templates.data(values, r)) for r in op.residuals]
        outputs = {}
        for i, (other, _) in enumerate(every):
            if other is op:
                if not outputs:
                    test_templates.check(op, kernels, i, plain, inputs, weights, values)
                out = kernels.run(i, inputs, weights, residuals, op.y.elements)
                outputs[i] = out.tobytes()
        assert len(outputs) > 1 and len(set(outputs.values())) == 1, op


@pytest.mark.slow
@pytest.mark.parametrize("ops", [CONVOLUTIONS, DEPTHWISE], ids=["conv", "depthwise"])
def test_float_kernels(ops: list[Op], tmp_path: Path) -> None:
    check_all(ops, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["float16", "int8", "int4"])
def test_other_weights(format: str, tmp_path: Path) -> None:
    chosen = [CONVOLUTIONS[0], CONVOLUTIONS[1], CONVOLUTIONS[12], DEPTHWISE[1], DEPTHWISE[3]]
    ops: list[Op] = [dataclasses.replace(op, weights=WeightFormat(format)) for op in chosen]  # type: ignore[call-overload, misc]
    check_all(ops, tmp_path)


def test_one_of_each(tmp_path: Path) -> None:
    """The same without what takes long."""
    check_all([CONVOLUTIONS[0], CONVOLUTIONS[12], DEPTHWISE[1]], tmp_path)


def signed(c: int, h: int, w: int, zero: int, pads: Pads = NONE) -> Blocked:
    lanes = c if c <= 2 else 4 if c <= 4 else -(-c // 16) * 16
    return Blocked(1, c, h, w, lanes, pads, "int8", zero)


def of_codes(
    c: int, co: int, h: int, w: int, pads: Pads = AROUND, kernel: tuple[int, int] = (1, 1),
    stride: int = 1, added: bool = False, zero: int = -128, groups: int = 1, limit: int = 127,
) -> QConvOp:  # fmt: skip
    need = [(s - 1) * stride + k for s, k in zip((h, w), kernel, strict=True)]
    border = (kernel[0] // 2, kernel[1] // 2, 0, 0)
    x = signed(c, need[0] - border[0], need[1] - border[1], 5, border)
    y = signed(co, h, w, zero, pads)
    residuals = (Residual(signed(co, h, w, 9), float(np.float32(0.37))),) if added else ()
    limits = Limits(-128 - zero, 127 - zero)
    return QConvOp(x, y, kernel, limits, (stride, stride), (1, 1), border[:2], groups, 8, limit,
                   residuals)  # fmt: skip


CODES: list[QConvOp] = [
    of_codes(64, 64, 4, 14),
    of_codes(32, 32, 5, 13, (1, 2, 0, 1), zero=3),
    of_codes(32, 32, 7, 7),
    of_codes(48, 48, 5, 13),
    of_codes(32, 64, 5, 13, NONE, added=True),
    of_codes(32, 32, 3, 3, added=True),
    of_codes(3, 32, 5, 14, kernel=(3, 3), stride=2),
    of_codes(3, 32, 3, 13, (0, 1, 0, 0), (3, 3)),
    of_codes(32, 32, 4, 9, kernel=(3, 3), stride=2),
    of_codes(16, 48, 9, 11, kernel=(3, 3), added=True),
    of_codes(32, 24, 8, 8, kernel=(3, 3), zero=3),
    of_codes(16, 16, 5, 13, kernel=(3, 3), groups=16),
    of_codes(32, 32, 4, 14, NONE, (3, 3), groups=32, added=True),
    of_codes(48, 48, 3, 7, kernel=(3, 3), groups=48, zero=3),
    of_codes(16, 16, 2, 1, kernel=(3, 3), groups=16),
    of_codes(32, 32, 5, 13, kernel=(3, 3), stride=2, groups=32),
]


@pytest.mark.slow
@pytest.mark.parametrize("target", [PI4, PI5], ids=["mlal", "sdot"])
def test_kernels_of_codes(target: Target, tmp_path: Path) -> None:
    rng, limit = np.random.default_rng(5), target.integer.weight_limit
    ops: list[Any] = [dataclasses.replace(op, limit=limit) for op in CODES]
    every = [(op, knobs) for op in ops for knobs in alternatives(op, target)]
    kernels = Emulated([op for op, _ in every], target, tmp_path, [knobs for _, knobs in every])
    for i, (op, _) in enumerate(every):
        shape = (op.y.c, op.x.c // op.groups, *op.kernel)
        w = rng.integers(-limit, limit + 1, shape).astype(np.int8)
        test_integer_templates.check_convolution(kernels, i, op, w, rng)


IMAGES = [
    of_codes(3, 32, 5, 14, kernel=(3, 3), stride=2),
    of_codes(3, 48, 3, 13, (0, 1, 0, 0), (3, 3), added=True, zero=3),
    of_codes(3, 16, 4, 9, (1, 0, 2, 1), (7, 7), stride=2),
    of_codes(1, 32, 6, 5, kernel=(10, 4), stride=2),
    of_codes(1, 16, 5, 9, kernel=(3, 3)),
    of_codes(2, 16, 4, 6, kernel=(1, 5)),
    of_codes(4, 16, 3, 1, kernel=(3, 2)),
    of_codes(3, 16, 3, 6, kernel=(5, 1), stride=3),
]


#: Of one channel: Arm of 32 bits takes no others, and rows of fewer than eight inputs.
NARROW = [
    *(op for op in IMAGES if op.x.c == 1),
    of_codes(1, 32, 6, 7, (0, 1, 2, 0), (10, 4), stride=2, added=True, zero=3),
    of_codes(1, 16, 4, 2, kernel=(3, 3)),
    of_codes(1, 48, 3, 3, kernel=(1, 2), stride=2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,limit", [("raspberry-pi-4", 63), ("raspberry-pi-4", 127), ("raspberry-pi-3-32", 127)]
)
def test_images(name: str, limit: int, tmp_path: Path) -> None:
    """Tiles of which the last is narrower, or moved back where a narrow one has few inputs."""
    target, rng = Target.load(name), np.random.default_rng(8)
    images = IMAGES
    if target.arch == "arm":
        assert not any(select(op, target)[0] is qimage.TEMPLATE for op in IMAGES if op.x.c > 1)
        images = NARROW
    ops = [dataclasses.replace(op, limit=limit) for op in images]
    assert all(select(op, target)[0] is qimage.TEMPLATE for op in ops)
    assert {qimage.default(op, target)["rest"] for op in ops} == {True, False}
    kernels = Emulated(list(ops), target, tmp_path)
    for i, op in enumerate(ops):
        w = rng.integers(-limit, limit + 1, (op.y.c, op.x.c, *op.kernel)).astype(np.int8)
        test_integer_templates.check_convolution(kernels, i, op, w, rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raspberry-pi-4", "raspberry-pi-3-32"])
def test_weights_of_four_bits(name: str, tmp_path: Path) -> None:
    """Sums in int16 that are widened once and several times, last steps of their own; at the end,
    the largest products there are, where one more would not fit."""
    target, rng = Target.load(name), np.random.default_rng(6)
    ops = [of_codes(c, 16, 1, 9) for c in (16, 24, 144, 224, 232, 256, 464)]
    ops += [of_codes(16, 32, 3, 9, kernel=(3, 3), stride=2)]
    ops += [of_codes(c, 16, 1, 5, zero=-128) for c in (240, 512)]
    ops = [dataclasses.replace(op, bits=4, limit=8) for op in ops]
    assert all(select(op, target)[0] is qconv.TEMPLATE for op in ops)
    kernels = Emulated(list(ops), target, tmp_path)
    for i, op in enumerate(ops):
        w = rng.integers(-8, 8, (op.y.c, op.x.c, *op.kernel)).astype(np.int8)
        test_integer_templates.check_convolution(kernels, i, op, w, rng)
    for i, op in list(enumerate(ops))[-2:]:
        full, w = (
            np.full((1, op.x.c, 1, 5), -128, np.int8),
            np.full((16, op.x.c, 1, 1), -8, np.int8),
        )
        b, m = np.zeros(16, np.int32), np.full(16, 0.23 / op.x.c, np.float32)
        total = test_integer_templates.convolved(op, full, w).astype(np.float32) * m[0]
        expected = test_integer_templates.rounded(total, op.limits, op.y.zero, "int8")
        assert 200 < int(expected.max()) + 128 < 255
        inputs = [op.x.pack(full)]
        test_integer_templates.check(kernels, i, op.y, inputs, [w, b, m], [], expected)


@pytest.mark.parametrize("lanes", [4, 8, 16, 24])
def test_tables(lanes: int, tmp_path: Path) -> None:
    """Every code, one at a time, in vectors of 8, of 16, and of 16 that overlap."""
    rng = np.random.default_rng(lanes)
    x = Blocked(1, lanes, 8, 9, lanes, (1, 0, 0, 2), "int8", 5)
    op = QTableOp(x, Blocked(1, lanes, 8, 9, lanes, AROUND, "int8", -7))
    kernels = Emulated([op], PI4, tmp_path)
    values = np.resize(rng.permutation(256) - 128, (1, lanes, 8, 9)).astype(np.int8)
    table = rng.integers(-128, 128, 256).astype(np.int8)
    expected = table[values.astype(int) + 128]
    test_integer_templates.check(kernels, 0, op.y, [x.pack(values)], [table], [], expected)
