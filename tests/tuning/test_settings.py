"""Every setting that a template offers computes the same bits as that of its default rule."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.kernels import winograd
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.integer_ops import Limits, QConvOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, MatmulOp, Op
from edgepipe.kernels.template import select
from edgepipe.target import Integer, Target
from tests.kernels.harness import Kernels, target_with

VECTORS = [(4, 16), (4, 32), (8, 16), (16, 32)]
#: Settings of one operator that are compiled.
SAMPLE = 6


def outputs(op: Op, target: Target, folder: Path, settings: list[dict[str, Any]],
            inputs: list[np.ndarray], weights: list[np.ndarray]) -> list[bytes]:  # fmt: skip
    """What each of ``settings`` computes."""
    kernels = Kernels([op] * len(settings), target, folder, settings)
    elements = op.m * op.n if isinstance(op, MatmulOp) else op.y.elements
    dtype = "float32" if isinstance(op, MatmulOp) else op.y.dtype
    return [
        kernels.run(i, inputs, weights, [], elements, dtype).tobytes()
        for i in range(len(settings))
    ]  # fmt: skip


def agree(op: Op, target: Target, folder: Path, rng: random.Random,
          inputs: list[np.ndarray], weights: list[np.ndarray]) -> None:  # fmt: skip
    template, reasons = select(op, target)
    assert template is not None, reasons
    default, offered = template.default(op, target), template.settings(op, target)
    assert len(offered) > 1, op
    assert len({repr(sorted(knobs.items())) for knobs in offered}) == len(offered)
    assert default == offered[0]
    drawn = rng.sample(offered[1:], min(SAMPLE, len(offered) - 1))
    folder.mkdir()
    first, *rest = outputs(op, target, folder, [default, *drawn], inputs, weights)
    for knobs, found in zip(drawn, rest, strict=True):
        assert found == first, (op, knobs)
    # Positive control: other weights, other bits.
    other = folder / "control"
    other.mkdir()
    changed = [np.roll(weights[0], 1, 0), *weights[1:]]
    assert outputs(op, target, other, [default], inputs, changed) != [first]


def conv_case(rng: random.Random, lanes: int, depthwise: bool) -> ConvOp:
    """A small convolution with an odd size."""
    k, stride = rng.choice([1, 3]) if not depthwise else rng.choice([3, 5]), rng.choice([1, 2])
    pad, h, w = k // 2, rng.randint(5, 9), rng.randint(5, 13)
    c = rng.choice([3, lanes, 2 * lanes + 1]) if depthwise else rng.choice([3, 2 * lanes])
    co = c if depthwise else rng.choice([lanes, 3 * lanes, 4 * lanes])
    border = (pad, pad, pad, pad)
    y = Blocked(1, co, (h + 2 * pad - k) // stride + 1, (w + 2 * pad - k) // stride + 1, lanes)
    return ConvOp(
        Blocked(1, c, h, w, lanes, border), y, (k, k), (stride, stride), offset=(pad, pad),
        groups=c if depthwise else 1, epilogue=(Step("relu"),),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("lanes, registers", VECTORS)
@pytest.mark.parametrize("depthwise", [False, True], ids=["conv", "depthwise"])
def test_convolutions(lanes: int, registers: int, depthwise: bool, tmp_path: Path) -> None:
    rng, values = random.Random(lanes + registers), np.random.default_rng(registers)
    for number in range(3):
        op = conv_case(rng, lanes, depthwise)
        x = values.standard_normal((1, op.x.c, op.x.h, op.x.w), dtype=np.float32)
        shape = (op.y.c, op.x.c // op.groups, *op.kernel)
        weights = [values.standard_normal(shape, dtype=np.float32),
                   values.standard_normal(op.y.c, dtype=np.float32)]  # fmt: skip
        target = target_with(lanes, registers)
        agree(op, target, tmp_path / str(number), rng, [op.x.pack(x)], weights)


@pytest.mark.slow
def test_winograd(tmp_path: Path) -> None:
    """Parts that do not come out even: strips of 7 rows, groups of 49 or fewer places."""
    values, target = np.random.default_rng(14), target_with(8, 16)
    op = ConvOp(Blocked(1, 37, 14, 14, 8, (1, 1, 1, 1)), Blocked(1, 64, 14, 14, 8), (3, 3),
                offset=(1, 1), epilogue=(Step("relu"),))  # fmt: skip
    assert select(op, target)[0] is winograd.TEMPLATE
    x = values.standard_normal((1, 37, 14, 14), dtype=np.float32)
    weights = [values.standard_normal((64, 37, 3, 3), dtype=np.float32),
               values.standard_normal(64, dtype=np.float32)]  # fmt: skip
    agree(op, target, tmp_path / "a", random.Random(14), [op.x.pack(x)], weights)


@pytest.mark.slow
@pytest.mark.parametrize("m, k, n", [(7, 13, 37), (1, 64, 40)])
def test_products(m: int, k: int, n: int, tmp_path: Path) -> None:
    values = np.random.default_rng(m)
    op = MatmulOp(1, m, k, n, constant=True, bias=True)
    arrays = [values.standard_normal(shape, dtype=np.float32) for shape in ((m, k), (k, n), (n,))]
    agree(op, target_with(8, 16), tmp_path / "a", random.Random(n), arrays[:1], arrays[1:])


@pytest.mark.slow
@pytest.mark.parametrize("depthwise", [False, True], ids=["conv", "depthwise"])
def test_convolutions_of_codes(depthwise: bool, tmp_path: Path) -> None:
    values, c = np.random.default_rng(5), 24
    target = dataclasses.replace(target_with(8, 16), integer=Integer("maddubs", "uint8", 63))
    co = c if depthwise else 40
    x = Blocked(1, c, 7, 9, c, (1, 1, 1, 1), "uint8", 3)
    y = Blocked(1, co, 7, 9, co, dtype="uint8", zero=2)
    op = QConvOp(x, y, (3, 3), Limits(-2.0, 253.0), offset=(1, 1), limit=63,
                 groups=c if depthwise else 1)  # fmt: skip
    shape = (co, c // op.groups, 3, 3)
    weights = [values.integers(-63, 64, shape).astype(np.int8),
               values.integers(-500, 500, co).astype(np.int32),
               values.uniform(0.001, 0.01, co).astype(np.float32)]  # fmt: skip
    codes = values.integers(0, 256, (1, c, 7, 9)).astype(np.uint8)
    agree(op, target, tmp_path / "a", random.Random(7), [x.pack(codes)], weights)
