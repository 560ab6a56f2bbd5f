"""CUDA templates against float64 over random shapes, in float32 and with halves in memory."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernels import reference
from kernels.harness import snr_db
from kernels.test_templates import conv_op, data, random_epilogue

from cuda.emulation import Emulated
from edgepipe.codegen.cuda import toolkit
from edgepipe.codegen.cuda.device import build_source
from edgepipe.kernels.cuda import conv, tensor
from edgepipe.kernels.cuda.tile import Tile
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import (
    BilinearOp,
    ConcatOp,
    ConvOp,
    ConvTransposeOp,
    GlobalPoolOp,
    MapOp,
    MatmulOp,
    Op,
    PoolOp,
    RelayoutOp,
    UpsampleOp,
)
from edgepipe.kernels.template import select
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target

pytestmark = pytest.mark.slow

TX2, XAVIER = Target.load("jetson-tx2"), Target.load("jetson-xavier-nx")
#: float32 sums in another order than the reference's; results rounded to halves once.
LEAST_SNR_DB = {"float32": 110.0, "float16": 60.0}


def stored(op: Any, dtype: str) -> Any:
    """``op`` with all its activations as ``dtype``."""
    changes: dict[str, Any] = {"y": dataclasses.replace(op.y, dtype=dtype)}
    for name in ("inputs", "residuals"):
        if hasattr(op, name):
            layouts = getattr(op, name)
            changes[name] = tuple(dataclasses.replace(x, dtype=dtype) for x in layouts)
    if hasattr(op, "x"):
        changes["x"] = dataclasses.replace(op.x, dtype=dtype)
    return dataclasses.replace(op, **changes)


def drawn(values: np.random.Generator, layout: Blocked) -> np.ndarray:
    return data(values, layout).astype(layout.dtype)


def check(
    op: Any, kernels: Emulated, plain: np.ndarray, inputs: list[np.ndarray],
    weights: list[np.ndarray], values: np.random.Generator,
) -> None:  # fmt: skip
    """Run and compare; ``plain`` is the float64 result before the epilogue."""
    operands = [drawn(values, r) for r in op.residuals]
    packed = [r.pack(o) for r, o in zip(op.residuals, operands, strict=True)]
    expected = reference.apply(op.epilogue, plain, operands)
    index = kernels.ops.index(op)
    out = kernels.run(index, inputs, weights, packed, op.y.elements, op.y.dtype)
    got, least = op.y.unpack(out), LEAST_SNR_DB[op.y.dtype]
    assert snr_db(expected, got) > least, op
    border = op.y.pack(np.ones((op.y.n, op.y.c, op.y.h, op.y.w), np.float32))[:, :1, :, :, 0]
    blocked = out.reshape(op.y.shape)
    assert np.isfinite(blocked).all(), op
    assert (blocked[:, :1, :, :, 0][border == 0] == 0).all(), op
    if expected.size > 1 and np.ptp(expected) > 0:  # positive control: one pixel moved
        assert snr_db(expected, np.roll(got.reshape(-1), 1).reshape(got.shape)) < least


def transposed_op(rng: random.Random) -> ConvTransposeOp:
    kernel = (rng.choice([1, 2, 3, 4]), rng.choice([2, 3, 5]))
    strides = (rng.choice([1, 2, 3]), rng.choice([1, 2]))
    dilations = (rng.choice([1, 1, 2]), 1)
    h, w = rng.randint(1, 5), rng.randint(1, 9)
    axes = zip((h, w), strides, kernel, dilations, strict=True)
    full = [(s - 1) * st + (k - 1) * d + 1 for s, st, k, d in axes]
    offset = tuple(rng.randrange(0, min(k, f)) for k, f in zip(kernel, full, strict=True))
    size = [max(1, f - o - rng.randrange(0, 2)) for f, o in zip(full, offset, strict=True)]
    n = rng.choice([1, 2])
    plain = Blocked(n, rng.choice([1, 3, 9]), h, w, rng.choice([1, 4]))
    y = Blocked(n, rng.choice([2, 8, 17]), *size, 4, rng.choice([(0, 0, 0, 0), (1, 0, 1, 2)]))
    border = ConvTransposeOp(plain, y, kernel, strides, dilations, offset).border()
    x = dataclasses.replace(plain, pads=border)
    return ConvTransposeOp(x, y, kernel, strides, dilations, offset, *random_epilogue(rng, y))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convolutions(dtype: str, tmp_path: Path) -> None:
    rng, values = random.Random(dtype), np.random.default_rng(7)
    kinds = ("pointwise", "regular", "grouped", "depthwise")
    ops: list[Any] = [conv_op(rng, 4, kind) for kind in kinds for _ in range(5)]
    ops = [stored(op, dtype) for op in [*ops, *(transposed_op(rng) for _ in range(8))]]
    kernels = Emulated(ops, TX2, tmp_path)
    for op in ops:
        x, transposed = drawn(values, op.x), isinstance(op, ConvTransposeOp)
        inputs = op.x.c // (1 if transposed else op.groups)
        shape = (op.x.c, op.y.c) if transposed else (op.y.c, inputs)
        w = values.standard_normal((*shape, *op.kernel)) * np.sqrt(2 / (inputs * op.kernel[0]))
        w, b = w.astype(np.float32), values.standard_normal(op.y.c).astype(np.float32)
        wanted = (reference.conv_transpose if transposed else reference.conv)(x, w, b, op)
        check(op, kernels, wanted, [op.x.pack(x)], [w, b], values)


def pool_op(rng: random.Random, kind: str) -> PoolOp:
    kernel = (rng.choice([1, 2, 3]), rng.choice([2, 3, 5]))
    strides = (rng.choice([1, 2]), rng.choice([1, 2, 3]))
    offset = tuple(rng.randrange(0, max(1, k - 1)) for k in kernel)
    end = tuple(rng.randrange(0, max(1, k - 1)) for k in kernel)
    h, w = kernel[0] + rng.randint(0, 6), kernel[1] + rng.randint(0, 9)
    size = [
        (s + o + e - k) // st + 1
        for s, o, e, k, st in zip((h, w), offset, end, kernel, strides, strict=True)
    ]
    pads = (*offset, *end) if kind == "average" else (0, 1, 0, 0)
    x = Blocked(rng.choice([1, 2]), rng.choice([3, 8, 20]), h, w, 4, pads)
    y = Blocked(x.n, x.c, *size, 4, rng.choice([(0, 0, 0, 0), (1, 1, 1, 1)]))
    return PoolOp(kind, x, y, kernel, strides, (1, 1), offset, rng.random() < 0.5, end,
                  *random_epilogue(rng, y))  # fmt: skip


def wide(op: Any, x: np.ndarray) -> np.ndarray:
    """What ``op`` without its epilogue makes of ``x``, in float64."""
    if isinstance(op, PoolOp):
        return reference.pool(x, op)
    if isinstance(op, BilinearOp):
        return reference.bilinear(x, op)
    x = x.astype(np.float64)
    if isinstance(op, GlobalPoolOp):
        return (np.max if op.kind == "max" else np.mean)(x, axis=(2, 3), keepdims=True)
    return x.repeat(2, 2).repeat(3, 3) if isinstance(op, UpsampleOp) else x


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_pooling_resizing_and_maps(dtype: str, tmp_path: Path) -> None:
    rng, values = random.Random(dtype), np.random.default_rng(3)
    ops: list[Any] = [pool_op(rng, kind) for kind in ("max", "average") for _ in range(5)]
    for mode in ("half_pixel", "align_corners", "asymmetric"):
        x = Blocked(2, rng.choice([3, 8]), rng.randint(2, 7), rng.randint(2, 9), 4, (1, 0, 0, 1))
        y = Blocked(2, x.c, rng.randint(2, 15), rng.randint(2, 15), 4, (0, 1, 1, 0))
        ops.append(BilinearOp(mode, x, y, *random_epilogue(rng, y)))
    for kind in ("max", "average", "max", "average"):
        x = Blocked(rng.choice([1, 2]), rng.choice([3, 16, 21]), rng.randint(1, 9),
                    rng.randint(1, 19), 4, rng.choice([(0, 0, 0, 0), (1, 1, 1, 1)]))  # fmt: skip
        one = Blocked(x.n, x.c, 1, 1, 4)
        ops.append(GlobalPoolOp(kind, x, one, *random_epilogue(rng, one)))
        same = Blocked(x.n, x.c, x.h, x.w, 4, (0, 2, 1, 0))
        ops.append(MapOp(x, same, *random_epilogue(rng, same)))
        up = Blocked(x.n, x.c, x.h * 2, x.w * 3, 4, (1, 1, 1, 1))
        ops.append(UpsampleOp(x, up, (2, 3), *random_epilogue(rng, up)))
    ops = [stored(op, dtype) for op in ops]
    kernels = Emulated(ops, TX2, tmp_path)
    for op in ops:
        x = drawn(values, op.x)
        check(op, kernels, wide(op, x), [op.x.pack(x)], [], values)


def test_copies_are_exact_and_change_the_type(tmp_path: Path) -> None:
    rng, values = random.Random(5), np.random.default_rng(5)
    ops: list[Op] = []
    for first, second in [("float32", "float16"), ("float16", "float32"), ("float16", "float16")]:
        n, c, h = rng.choice([1, 2]), rng.choice([1, 3, 9, 16]), rng.randint(1, 5)
        borders = [(0, 0, 0, 0), (1, 0, 2, 1)]
        a = Blocked(n, c, h, 6, rng.choice([1, 4]), rng.choice(borders), first)
        ops.append(RelayoutOp(a, Blocked(n, c, h, 6, 4, rng.choice(borders), second)))
        ops.append(RelayoutOp(a, Blocked(n, c, h, 6, 1, (0, 0, 0, 0), second)))
        parts = tuple(Blocked(n, k, h, 6, 4, rng.choice(borders), first) for k in (4, 8, c))
        ops.append(ConcatOp(parts, Blocked(n, 12 + c, h, 6, 4, (1, 1, 0, 0), second)))
    kernels = Emulated(ops, TX2, tmp_path)
    for i, op in enumerate(ops):
        assert isinstance(op, RelayoutOp | ConcatOp)
        inputs = [op.x] if isinstance(op, RelayoutOp) else list(op.inputs)
        arrays = [drawn(values, x) for x in inputs]
        packed = [x.pack(a) for x, a in zip(inputs, arrays, strict=True)]
        out = kernels.run(i, packed, [], [], op.y.elements, op.y.dtype)
        expected = op.y.pack(np.concatenate(arrays, 1).astype(op.y.dtype))
        np.testing.assert_array_equal(out.reshape(op.y.shape), expected, err_msg=str(op))
        assert not np.array_equal(np.roll(out, 1).reshape(op.y.shape), expected) or op.y.c == 1


def matmul_op(rng: random.Random, row: bool) -> MatmulOp:
    """A product with random operands; ``row`` for one row and a constant matrix."""
    constant = row or rng.random() < 0.5
    batch, m = (1, 1) if row else (1 if constant else rng.choice([1, 3]), rng.choice([2, 7, 37]))
    k, n = rng.choice([1, 3, 21, 150]), rng.choice([1, 3, 10, 16, 33, 132])
    kinds = tuple(rng.choice(["full", "row"]) for _ in range(rng.choice([0, 1, 2])))
    steps = (*(Step(rng.choice(["add", "mul"])) for _ in kinds), Step(rng.choice(["relu", "gelu"])))
    kind = rng.choice(["float32", "float16", "int8"]) if constant else "float32"
    return MatmulOp(
        batch, m, k, n, constant, constant and rng.random() < 0.5,
        not constant and rng.random() < 0.5, rng.random() < 0.7, steps, kinds,
        WeightFormat(kind),
    )  # fmt: skip


def test_products(tmp_path: Path) -> None:
    rng, values = random.Random(9), np.random.default_rng(9)
    ops: list[Any] = [matmul_op(rng, row) for row in (True, False) for _ in range(12)]
    kernels = Emulated(ops, TX2, tmp_path)
    for i, op in enumerate(ops):
        a = values.standard_normal((op.batch if op.a_batched else 1, op.m, op.k), np.float32)
        b = values.standard_normal((op.batch if op.b_batched else 1, op.k, op.n), np.float32)
        bias, scale = values.standard_normal((2, op.n), np.float32)
        scales = [scale] if op.weights.coded else []
        if op.weights.coded:
            b = values.integers(-127, 128, b.shape).astype(np.int8)
        elif op.weights.kind == "float16":
            b = b.astype(np.float16)
        sizes = {"full": (op.batch, op.m, op.n), "row": (op.n,)}
        operands = [values.standard_normal(sizes[r], np.float32) for r in op.residuals]
        plain = a.astype(np.float64) @ (b.astype(np.float64) * (scale if scales else 1))
        plain = np.broadcast_to(plain, (op.batch, op.m, op.n)) + (bias if op.bias else 0)
        expected = reference.apply(op.epilogue, plain, operands)
        weights = ([b[0], *scales] if op.constant else []) + ([bias] if op.bias else [])
        out = kernels.run(i, [a] + ([] if op.constant else [b]), weights, operands, expected.size)
        got = out.reshape(expected.shape)
        assert snr_db(expected, got) > LEAST_SNR_DB["float32"], op
        if op.k > 1 and op.n > 1 and np.ptp(expected) > 0:  # positive control
            assert snr_db(expected, np.roll(got, 1, -1)) < LEAST_SNR_DB["float32"], op


def test_tensor_cores(tmp_path: Path) -> None:
    rng, values, tile = random.Random(3), np.random.default_rng(1), WeightFormat("float16")
    ops: list[Any] = [stored(conv_op(rng, 4, k), "float16") for k in ("pointwise", "regular") * 5]
    large = ConvOp(Blocked(1, 70, 9, 9, 4, (1, 1, 1, 1)), Blocked(1, 70, 9, 9, 4), (3, 3),
                   offset=(1, 1))  # fmt: skip
    ops = [dataclasses.replace(op, weights=tile) for op in [*ops, stored(large, "float16")]]
    ops = [op for op in ops if op.x.lanes == 4]
    kernels = Emulated(ops, XAVIER, tmp_path)
    assert {template.name for template, _ in kernels.chosen} == {"tensor_conv"}
    for op in ops:
        x, depth = drawn(values, op.x), op.x.c * op.kernel[0] * op.kernel[1]
        w = values.standard_normal((op.y.c, op.x.c, *op.kernel)) * np.sqrt(2 / depth)
        w, b = w.astype(np.float16), values.standard_normal(op.y.c).astype(np.float32)
        check(op, kernels, reference.conv(x, w, b, op), [op.x.pack(x)], [w, b], values)


@pytest.mark.needs_cuda_toolkit
@pytest.mark.parametrize("knobs", [tile.knobs() for tile in tensor.CHOICES])
@pytest.mark.parametrize("sm", [72, 87])
def test_tensor_cores_assemble_without_spills(sm: int, knobs: dict[str, int]) -> None:
    assert XAVIER.cuda is not None
    cuda = dataclasses.replace(XAVIER.cuda, sm=sm)
    board = dataclasses.replace(XAVIER, cuda=cuda)
    layout = Blocked(1, 128, 28, 28, 4, (1, 1, 1, 1), "float16")
    op = ConvOp(layout, layout, (3, 3), offset=(1, 1), weights=WeightFormat("float16"))
    template, _ = select(op, board)
    assert template is not None
    ptx = toolkit.to_ptx(build_source({"k": template.emit(op, knobs)}, board).source, cuda)
    squares = knobs["tm"] * knobs["tn"] // 256
    assert ptx.count("wmma.mma.sync") % (2 * squares) == 0
    assert "wmma.mma.sync" in ptx
    _, resources = toolkit.to_cubin(ptx, cuda)
    assert resources["k"].spill_bytes == 0


@pytest.mark.needs_cuda_toolkit
def test_a_kernel_that_spills_gets_more_registers() -> None:
    assert TX2.cuda is not None
    x = Blocked(1, 32, 27, 27, 4, (1, 1, 1, 1), "float16")
    op = ConvOp(x, Blocked(1, 128, 27, 27, 4, dtype="float16"), (1, 1), epilogue=(Step("relu"),),
                weights=WeightFormat("float16"))  # fmt: skip
    source = build_source({"k": conv.emit(op, Tile(8, 4, 8, 16, 16).knobs())}, TX2).source
    _, resources = toolkit.to_cubin(toolkit.to_ptx(source, TX2.cuda), TX2.cuda)
    assert resources["k"].spill_bytes > 0
    roomier, ptx, _, resources = toolkit.assemble(source, TX2.cuda)
    assert resources["k"].spill_bytes == 0
    assert "__launch_bounds__(128, 4) k(" in roomier
    assert ".minnctapersm 4" in ptx
