"""Every template against float64, over odd shapes, strides, paddings and vector widths."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path

import numpy as np
import pytest

from edgepipe.kernels import packed_conv, winograd
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import (
    BilinearOp,
    ConcatOp,
    ConvOp,
    ConvTransposeOp,
    GlobalPoolOp,
    LayerNormOp,
    MapOp,
    MatmulOp,
    Op,
    PoolOp,
    RelayoutOp,
    SoftmaxOp,
    UpsampleOp,
)
from edgepipe.kernels.template import select
from edgepipe.target import Target
from tests.kernels import reference, test_integer_templates, test_sparse_templates
from tests.kernels.harness import FLOOR_DB, Kernels, snr_db, target_with

#: lanes, registers, and the knobs that another kind of target chooses
VECTORS = [
    pytest.param(4, 16, {"channel_loop": True, "unroll": 1}, id="4x16-wasm"),
    pytest.param(4, 16, {"channel_loop": True, "lane_loop": True, "unroll": 1}, id="4x16-lanes"),
    pytest.param(4, 32, {"by_element": True}, id="4x32-arm"),
    pytest.param(8, 16, {}, id="8x16"),
    pytest.param(16, 32, {}, id="16x32"),
]


def random_epilogue(
    rng: random.Random, y: Blocked, border: bool = True
) -> tuple[tuple[Step, ...], tuple[Blocked, ...]]:
    steps: list[Step] = []
    residuals: list[Blocked] = []
    if rng.random() < 0.5:
        kind = rng.choice(["add", "mul", "sub", "rsub", "max", "min", "prelu"])
        steps.append(Step(kind))
        spread = rng.random() < 0.3
        pads = (1, 0, 2, 1) if border and not spread and rng.random() < 0.5 else (0, 0, 0, 0)
        h, w = (1, 1) if spread else (y.h, y.w)
        residuals.append(Blocked(1 if spread else y.n, y.c, h, w, y.lanes, pads))
    if rng.random() < 0.7:
        kind = rng.choice([k for k in reference.UNARY if k != "sqrt"])
        values = {"clip": (-0.5, 0.75), "leaky_relu": (0.1,), "hard_sigmoid": (0.2, 0.5),
                  "elu": (0.7,), "scale": (0.5,), "offset": (-0.25,)}.get(kind, ())  # fmt: skip
        steps.append(Step(kind, values))
    return tuple(steps), tuple(residuals)


def data(rng: np.random.Generator, layout: Blocked) -> np.ndarray:
    return rng.standard_normal((layout.n, layout.c, layout.h, layout.w), dtype=np.float32)


def check(
    op: Op, kernels: Kernels, index: int, plain: np.ndarray, inputs: list[np.ndarray],
    weights: list[np.ndarray], rng: np.random.Generator,
) -> None:  # fmt: skip
    """Run and compare; ``plain`` is the float64 result before the epilogue."""
    operands = [data(rng, r) for r in op.residuals]
    packed = [r.pack(o) for r, o in zip(op.residuals, operands, strict=True)]
    expected = reference.apply(op.epilogue, plain, operands)
    out = kernels.run(index, inputs, weights, packed, op.y.elements)
    got = op.y.unpack(out)
    assert snr_db(expected, got) > FLOOR_DB, op
    border = op.y.pack(np.ones((op.y.n, op.y.c, op.y.h, op.y.w), np.float32))[:, :1, :, :, 0]
    blocked = out.reshape(op.y.shape)
    assert np.isfinite(blocked).all(), op
    assert (blocked[:, :1, :, :, 0][border == 0] == 0).all(), op
    if expected.size > 1 and np.ptp(expected) > 0:  # positive control: one pixel moved
        wrong = np.roll(got.reshape(-1), 1).reshape(got.shape)
        assert snr_db(expected, wrong) < FLOOR_DB


def conv_op(rng: random.Random, lanes: int, kind: str) -> ConvOp:
    kernel = (1, 1) if kind == "pointwise" else (rng.choice([1, 2, 3, 5]), rng.choice([1, 3, 5, 7]))
    strides = (1, 1) if kind == "pointwise" else (rng.choice([1, 2, 3]), rng.choice([1, 2]))
    dilations = (rng.choice([1, 1, 2]), rng.choice([1, 1, 2]))
    offset = tuple(rng.randrange(0, k) for k in kernel)
    if kind == "pointwise" and rng.random() < 0.5:
        strides = (2, 2)
    groups, c, co = 1, rng.choice([1, 3, 5, 17, 33, 40]), rng.choice([1, 2, 7, 24, 65])
    if kind == "grouped":
        groups = rng.choice([2, 3])
        c, co = groups * lanes * rng.choice([1, 2]), groups * lanes * rng.choice([1, 3])
    if kind == "depthwise":
        groups = co = c = rng.choice([2, 3, 8, 19, 35])
    x_lanes = lanes if kind in ("grouped", "depthwise") or rng.random() < 0.6 else 1
    y_h, y_w = rng.randint(1, 9), rng.choice([1, 2, 3, 5, 8, 13, 15])
    need = [(s - 1) * st + (k - 1) * d + 1 for s, st, k, d in
            zip((y_h, y_w), strides, kernel, dilations, strict=True)]  # fmt: skip
    h = max(1, need[0] - offset[0] - rng.randrange(0, kernel[0]))
    w = max(1, need[1] - offset[1] - rng.randrange(0, kernel[1]))
    pads = (offset[0], offset[1], max(0, need[0] - offset[0] - h), max(0, need[1] - offset[1] - w))
    n = rng.choice([1, 1, 2])
    x = Blocked(n, c, h, w, x_lanes, pads)
    y = Blocked(n, co, y_h, y_w, lanes, rng.choice([(0, 0, 0, 0), (1, 2, 0, 1)]))
    steps, residuals = random_epilogue(rng, y)
    return ConvOp(x, y, kernel, strides, dilations, offset, groups, steps, residuals)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pointwise", "regular", "grouped", "depthwise"])
@pytest.mark.parametrize(("lanes", "registers", "knobs"), VECTORS)
def test_convolution(
    kind: str, lanes: int, registers: int, knobs: dict[str, object], tmp_path: Path
) -> None:
    rng, values = random.Random(f"{kind}{lanes}{registers}"), np.random.default_rng(7)
    ops = [conv_op(rng, lanes, kind) for _ in range(12)]
    if "by_element" in knobs:
        ops = [op for op in ops if op.x.lanes == 4]
    kernels = Kernels(ops, target_with(lanes, registers), tmp_path, **knobs)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        scale = np.sqrt(2 / (op.x.c // op.groups * op.kernel[0] * op.kernel[1]))
        shape = (op.y.c, op.x.c // op.groups, *op.kernel)
        w = (values.standard_normal(shape) * scale).astype(np.float32)
        b = values.standard_normal(op.y.c).astype(np.float32)
        check(op, kernels, i, reference.conv(x, w, b, op), [op.x.pack(x)], [w, b], values)


def winograd_op(rng: random.Random, lanes: int, sides: tuple[int, int] | None = None) -> ConvOp:
    """Channels that do not fill their last block, more border than is needed."""
    c, co = rng.choice([32, 37, 48]), rng.choice([32, 40, 65])
    h, w = sides or rng.choice([(14, 14), (10, 22), (2, 97), (9, 9), (15, 18)])
    offset = (rng.choice([0, 1, 2]), rng.choice([0, 1, 2]))
    held = [max(2, s + 2 - o - rng.choice([0, 1])) for s, o in zip((h, w), offset, strict=True)]
    pads = (offset[0], offset[1], h + 2 - offset[0] - held[0], w + 2 - offset[1] - held[1] + 1)
    x = Blocked(rng.choice([1, 2]), c, *held, lanes, pads)
    y = Blocked(x.n, co, h, w, lanes, rng.choice([(0, 0, 0, 0), (1, 2, 0, 1)]))
    return ConvOp(x, y, (3, 3), (1, 1), (1, 1), offset, 1, *random_epilogue(rng, y))


@pytest.mark.slow
@pytest.mark.parametrize("strips", [{}, {"rows": 3}], ids=["whole", "strips"])
@pytest.mark.parametrize(("lanes", "registers", "knobs"), VECTORS)
def test_winograd(
    lanes: int, registers: int, knobs: dict[str, object], strips: dict[str, int], tmp_path: Path
) -> None:
    rng, values = random.Random(f"w{lanes}{registers}"), np.random.default_rng(8)
    target = target_with(lanes, registers)
    knobs = strips | {k: v for k, v in knobs.items() if k in ("channel_loop", "by_element")}
    ops = [winograd_op(rng, lanes) for _ in range(8)]
    ops += [winograd_op(rng, lanes, sides) for sides in ((28, 28), (30, 29))]
    assert all(select(op, target)[0] is winograd.TEMPLATE for op in ops)
    chosen = [winograd.default(op, target)["side"] for op in ops]
    assert chosen[-2:] == [4, 4] and 2 in chosen
    kernels = Kernels(ops, target, tmp_path, **knobs)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        shape = (op.y.c, op.x.c, 3, 3)
        w = (values.standard_normal(shape) * np.sqrt(2 / (9 * op.x.c))).astype(np.float32)
        b = values.standard_normal(op.y.c).astype(np.float32)
        check(op, kernels, i, reference.conv(x, w, b, op), [op.x.pack(x)], [w, b], values)


@pytest.mark.slow
@pytest.mark.parametrize("strip", [None, 4, 12], ids=["default", "one tile", "several"])
@pytest.mark.parametrize("kind", ["pointwise", "regular"])
def test_convolution_of_packed_inputs(kind: str, strip: int | None, tmp_path: Path) -> None:
    """What WebAssembly has, compiled for this machine; an odd number of blocks among them."""
    rng, values = random.Random(f"p{kind}"), np.random.default_rng(9)
    target, ops = Target.load("wasm-simd"), []
    while len(ops) < 12:
        op = conv_op(rng, 4, kind)
        op = dataclasses.replace(op, y=dataclasses.replace(op.y, c=rng.choice([32, 36, 65])))
        steps, residuals = random_epilogue(rng, op.y)
        op = dataclasses.replace(op, epilogue=steps, residuals=residuals)
        if op.y.h * op.y.w >= 4:
            ops.append(op)
    assert all(select(op, target)[0] is packed_conv.TEMPLATE for op in ops)
    chosen = {} if strip is None else {"strip": strip}
    kernels = Kernels(list(ops), target, tmp_path, **chosen)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        shape = (op.y.c, op.x.c, *op.kernel)
        scale = np.sqrt(2 / (op.x.c * op.kernel[0] * op.kernel[1]))
        w = (values.standard_normal(shape) * scale).astype(np.float32)
        b = values.standard_normal(op.y.c).astype(np.float32)
        check(op, kernels, i, reference.conv(x, w, b, op), [op.x.pack(x)], [w, b], values)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"strides": (2, 2)}, "it has strides"),
        ({"x": Blocked(1, 64, 14, 14, 1, (1, 1, 1, 1))}, ""),
        ({"y": Blocked(1, 64, 1, 64, 8)}, "smaller than a tile"),
        ({"y": Blocked(1, 31, 14, 14, 8)}, "fewer than 32 channels"),
        ({"y": Blocked(1, 64, 8, 12, 8)}, "or 25 tiles"),
        ({"groups": 2}, ""),
    ],
)
def test_what_winograd_leaves_to_others(changes: dict[str, object], why: str) -> None:
    op = ConvOp(Blocked(1, 64, 14, 14, 8, (1, 1, 1, 1)), Blocked(1, 64, 14, 14, 8), (3, 3),
                offset=(1, 1))  # fmt: skip
    target = target_with(8, 16)
    assert select(op, target)[0] is winograd.TEMPLATE
    template, reasons = select(dataclasses.replace(op, **changes), target)  # type: ignore[arg-type]
    assert template is not None and template.name == "conv"
    told = next((r for r in reasons if r.startswith("winograd")), "")
    assert re.search(why, told) and bool(why) == bool(told)


@pytest.mark.slow
def test_transposed_convolution(tmp_path: Path) -> None:
    rng, values = random.Random(11), np.random.default_rng(11)
    ops = []
    for _ in range(24):
        kernel = (rng.choice([1, 2, 3, 4]), rng.choice([2, 3, 5]))
        strides = (rng.choice([1, 2, 3]), rng.choice([1, 2]))
        dilations = (rng.choice([1, 1, 2]), 1)
        h, w = rng.randint(1, 5), rng.randint(1, 9)
        axes = zip((h, w), strides, kernel, dilations, strict=True)
        full = [(s - 1) * st + (k - 1) * d + 1 for s, st, k, d in axes]
        offset = tuple(rng.randrange(0, min(k, f)) for k, f in zip(kernel, full, strict=True))
        size = [max(1, f - o - rng.randrange(0, 2)) for f, o in zip(full, offset, strict=True)]
        plain = Blocked(1, rng.choice([1, 3, 9]), h, w, rng.choice([1, 8]))
        y = Blocked(1, rng.choice([2, 8, 17]), *size, 8, rng.choice([(0, 0, 0, 0), (1, 0, 1, 2)]))
        border = ConvTransposeOp(plain, y, kernel, strides, dilations, offset).border()
        x = Blocked(1, plain.c, h, w, plain.lanes, border)
        steps, residuals = random_epilogue(rng, y)
        ops.append(ConvTransposeOp(x, y, kernel, strides, dilations, offset, steps, residuals))
    kernels = Kernels(ops, target_with(8, 16), tmp_path)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        w = values.standard_normal((op.x.c, op.y.c, *op.kernel), dtype=np.float32)
        b = values.standard_normal(op.y.c, dtype=np.float32)
        plain_result = reference.conv_transpose(x, w, b, op)
        check(op, kernels, i, plain_result, [op.x.pack(x)], [w, b], values)


@pytest.mark.parametrize("mode", ["half_pixel", "align_corners", "asymmetric"])
def test_bilinear(mode: str, tmp_path: Path) -> None:
    rng, values = random.Random(mode), np.random.default_rng(2)
    ops = []
    for _ in range(8):
        x = Blocked(1, rng.choice([3, 8]), rng.randint(1, 7), rng.randint(2, 9), 8, (1, 0, 0, 1))
        y = Blocked(1, x.c, rng.randint(1, 15), rng.randint(1, 15), 8, (0, 1, 1, 0))
        ops.append(BilinearOp(mode, x, y, *random_epilogue(rng, y)))
    kernels = Kernels(ops, target_with(8, 16), tmp_path)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        check(op, kernels, i, reference.bilinear(x, op), [op.x.pack(x)], [], values)


@pytest.mark.parametrize("kind", ["max", "average"])
def test_pooling(kind: str, tmp_path: Path) -> None:
    rng, values = random.Random(kind), np.random.default_rng(1)
    ops = []
    for _ in range(24):
        kernel = (rng.choice([1, 2, 3]), rng.choice([2, 3, 5]))
        strides = (rng.choice([1, 2]), rng.choice([1, 2, 3]))
        offset = tuple(rng.randrange(0, max(1, k - 1)) for k in kernel)
        end = tuple(rng.randrange(0, max(1, k - 1)) for k in kernel)
        h, w = kernel[0] + rng.randint(0, 6), kernel[1] + rng.randint(0, 9)
        y_h = (h + offset[0] + end[0] - kernel[0]) // strides[0] + 1
        y_w = (w + offset[1] + end[1] - kernel[1]) // strides[1] + 1
        pads = (*offset, *end) if kind == "average" else (0, 1, 0, 0)
        x = Blocked(1, rng.choice([3, 8, 20]), h, w, 8, pads)
        y = Blocked(1, x.c, y_h, y_w, 8, rng.choice([(0, 0, 0, 0), (1, 1, 1, 1)]))
        steps, residuals = random_epilogue(rng, y)
        ops.append(PoolOp(kind, x, y, kernel, strides, (1, 1), offset, rng.random() < 0.5, end,
                          steps, residuals))  # fmt: skip
    kernels = Kernels(ops, target_with(8, 16), tmp_path)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        check(op, kernels, i, reference.pool(x, op), [op.x.pack(x)], [], values)


def test_global_pooling_map_and_upsampling(tmp_path: Path) -> None:
    rng, values = random.Random(3), np.random.default_rng(3)
    ops: list[Op] = []
    for _ in range(10):
        x = Blocked(rng.choice([1, 2]), rng.choice([3, 16, 21]), rng.randint(1, 9),
                    rng.randint(1, 9), 16, rng.choice([(0, 0, 0, 0), (1, 1, 1, 1)]))  # fmt: skip
        one = Blocked(x.n, x.c, 1, 1, 16, rng.choice([(0, 0, 0, 0), (1, 1, 0, 2)]))
        ops.append(GlobalPoolOp(rng.choice(["max", "average"]), x, one, *random_epilogue(rng, one)))
        same = Blocked(x.n, x.c, x.h, x.w, 16, (0, 2, 1, 0))
        ops.append(MapOp(x, same, *random_epilogue(rng, same)))
        up = Blocked(x.n, x.c, x.h * 2, x.w * 3, 16, (1, 1, 1, 1))
        ops.append(UpsampleOp(x, up, (2, 3), *random_epilogue(rng, up)))
    kernels = Kernels(ops, target_with(16, 32), tmp_path)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        wide = x.astype(np.float64)
        if isinstance(op, GlobalPoolOp):
            reduce = np.max if op.kind == "max" else np.mean
            wide = reduce(wide, axis=(2, 3), keepdims=True)
        elif isinstance(op, UpsampleOp):
            wide = wide.repeat(2, 2).repeat(3, 3)
        check(op, kernels, i, wide, [op.x.pack(x)], [], values)


@pytest.mark.slow
def test_relayout_and_concat_are_exact(tmp_path: Path) -> None:
    rng, values = random.Random(5), np.random.default_rng(5)
    ops: list[Op] = []
    for _ in range(20):
        n, c, h, w = rng.choice([1, 2]), rng.choice([1, 3, 4, 9, 16]), rng.randint(1, 5), 6
        borders = [(0, 0, 0, 0), (1, 0, 2, 1)]
        a = Blocked(n, c, h, w, rng.choice([1, 4]), rng.choice(borders))
        b = Blocked(n, c, h, w, rng.choice([1, 4]), rng.choice(borders))
        ops.append(RelayoutOp(a, b))
        parts = tuple(Blocked(n, k, h, w, 4, rng.choice(borders)) for k in (4, 8, c))
        ops.append(ConcatOp(parts, Blocked(n, 12 + c, h, w, 4, (1, 1, 0, 0))))
    kernels = Kernels(ops, target_with(4, 16), tmp_path)
    for i, op in enumerate(ops):
        inputs = [op.x] if isinstance(op, RelayoutOp) else list(op.inputs)
        arrays = [data(values, x) for x in inputs]
        packed = [x.pack(a) for x, a in zip(inputs, arrays, strict=True)]
        out = kernels.run(i, packed, [], [], op.y.elements)
        expected = op.y.pack(np.concatenate(arrays, 1))
        np.testing.assert_array_equal(out.reshape(op.y.shape), expected, err_msg=str(op))


@pytest.mark.parametrize(("lanes", "registers", "knobs"), VECTORS)
def test_matmul(lanes: int, registers: int, knobs: dict[str, object], tmp_path: Path) -> None:
    rng, values = random.Random(lanes + registers), np.random.default_rng(lanes)
    ops = []
    for _ in range(30):
        constant = rng.random() < 0.6
        batch = 1 if constant else rng.choice([1, 3])
        m, k, n = rng.choice([1, 2, 7, 13]), rng.choice([1, 3, 8, 21]), rng.choice(
            [1, 2, 3, 10, 16, 33, 65]
        )  # fmt: skip
        kinds = tuple(rng.choice(["full", "row"]) for _ in range(rng.choice([0, 1, 2])))
        steps = (*(Step(rng.choice(["add", "mul"])) for _ in kinds), Step("relu"))
        ops.append(MatmulOp(batch, m, k, n, constant, constant and rng.random() < 0.5,
                            not constant and rng.random() < 0.5, rng.random() < 0.7, steps,
                            kinds))  # fmt: skip
    kernels = Kernels(ops, target_with(lanes, registers), tmp_path, **knobs)
    for i, op in enumerate(ops):
        a_batch = op.batch if op.a_batched else 1
        a = values.standard_normal((a_batch, op.m, op.k), dtype=np.float32)
        b_batch = op.batch if op.b_batched else 1
        b = values.standard_normal((b_batch, op.k, op.n), dtype=np.float32)
        bias = values.standard_normal(op.n, dtype=np.float32)
        sizes = {"full": (op.batch, op.m, op.n), "row": (op.n,)}
        operands = [values.standard_normal(sizes[r], dtype=np.float32) for r in op.residuals]
        plain = np.broadcast_to(a.astype(np.float64) @ b.astype(np.float64),
                                (op.batch, op.m, op.n))  # fmt: skip
        plain = plain + bias if op.bias else plain
        expected = reference.apply(op.epilogue, plain, operands)
        weights = ([b[0]] if op.constant else []) + ([bias] if op.bias else [])
        inputs = [a] + ([] if op.constant else [b])
        out = kernels.run(i, inputs, weights, operands, op.batch * op.m * op.n)
        assert snr_db(expected, out.reshape(expected.shape)) > FLOOR_DB, op


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "registers"), [(4, 16), (4, 32), (8, 16), (16, 32)])
def test_dense_layers_of_few_outputs(lanes: int, registers: int, tmp_path: Path) -> None:
    rng, values = random.Random(lanes + registers), np.random.default_rng(registers)
    ops, target = [], target_with(lanes, registers)
    for m in (1, 1, 1, 2, 5, 9):
        for n in (1, 2, 3, lanes + 1 if m == 1 else lanes - 1):
            # Of less, vectors of outputs may take fewer multiply-adds.
            least = max(2 * lanes, 12) if n == 1 else 160
            k = least + rng.choice([0, 1, lanes - 1, 3 * lanes + 5, 150])
            kinds = tuple(rng.choice(["full", "row"]) for _ in range(rng.choice([0, 1, 2])))
            steps = (*(Step(rng.choice(["add", "mul"])) for _ in kinds), Step("relu"))
            ops.append(MatmulOp(rng.choice([1, 3]), m, k, n, True, rng.random() < 0.5,
                                epilogue=steps, residuals=kinds))  # fmt: skip
    ops = [op for op in ops if op.batch == 1 or op.n < lanes]
    kernels = Kernels(ops, target, tmp_path)
    for i, op in enumerate(ops):
        assert kernels.templates[i].name == "narrow", op
        a = values.standard_normal((op.batch, op.m, op.k), dtype=np.float32)
        b = values.standard_normal((op.k, op.n), dtype=np.float32)
        bias = values.standard_normal(op.n, dtype=np.float32)
        sizes = {"full": (op.batch, op.m, op.n), "row": (op.n,)}
        operands = [values.standard_normal(sizes[r], dtype=np.float32) for r in op.residuals]
        plain = a.astype(np.float64) @ b.astype(np.float64) + (bias if op.bias else 0)
        expected = reference.apply(op.epilogue, plain, operands)
        weights = [b, bias] if op.bias else [b]
        out = kernels.run(i, [a], weights, operands, op.batch * op.m * op.n)
        # Elements may cancel, and a result has few: against the size of what is added up.
        error = np.abs(out.reshape(expected.shape) - expected).max()
        scale = np.prod([max(1.0, np.abs(r).max()) for r in operands]) * np.sqrt(op.k)
        assert error < 2e-6 * scale, op
        wrong = kernels.run(i, [np.roll(a, 1, 2)], weights, operands, op.batch * op.m * op.n)
        assert np.abs(wrong.reshape(expected.shape) - expected).max() > 2e-6 * scale or not (
            expected.any()  # what ReLU leaves nothing of
        )


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "registers"), [(4, 16), (8, 16), (16, 32)])
def test_sums_of_one_row_are_several_short_ones(lanes: int, registers: int, tmp_path: Path) -> None:
    """Rounding grows with the terms of a sum: p sums of k / p terms have √p less of it than one.

    The control is what one sum in turn is away from float64."""
    k = 2431
    ops = [MatmulOp(1, 1, k, n, True) for n in (1, lanes - 1, registers)]
    kernels = Kernels(ops, target_with(lanes, registers), tmp_path)
    assert [t.name for t in kernels.templates] == ["narrow", "narrow", "matmul"]
    values = np.random.default_rng(lanes)
    for i, (op, parts) in enumerate(zip(ops, (4 * lanes, lanes, 2), strict=True)):
        found, alone = [], []
        for _ in range(1 + 200 // op.n):
            a = values.standard_normal((1, k), dtype=np.float32)
            b = values.standard_normal((k, op.n), dtype=np.float32)
            exact = (a.astype(np.float64) @ b.astype(np.float64))[0]
            found.append(kernels.run(i, [a], [b], [], op.n) - exact)
            alone.append((a.T * b).cumsum(0, dtype=np.float32)[-1] - exact)
        ratio = np.sqrt(np.mean(np.square(found)) / np.mean(np.square(alone)))
        assert ratio < 1.3 / np.sqrt(parts), (op, parts)


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_softmax_and_layer_normalisation(lanes: int, tmp_path: Path) -> None:
    rng, values = random.Random(lanes), np.random.default_rng(lanes)
    ops: list[Op] = []
    for n in (1, 2, 3, 5, 16, 17, 31, 64, 197):
        ops.append(SoftmaxOp(rng.randint(1, 5), n))
        ops.append(LayerNormOp(rng.randint(1, 5), n, 1e-5, rng.random() < 0.7))
    kernels = Kernels(ops, target_with(lanes, 16), tmp_path)
    for i, op in enumerate(ops):
        x = (values.standard_normal((op.rows, op.n)) * 3).astype(np.float32)
        wide = x.astype(np.float64)
        weights = []
        if isinstance(op, SoftmaxOp):
            wide = np.exp(wide - wide.max(1, keepdims=True))
            expected = wide / wide.sum(1, keepdims=True)
        else:
            weights = [values.standard_normal(op.n).astype(np.float32) for _ in range(1 + op.bias)]
            centred = wide - wide.mean(1, keepdims=True)
            expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + op.epsilon)
            expected = expected * weights[0] + (weights[1] if op.bias else 0)
        got = kernels.run(i, [x], weights, [], x.size).reshape(x.shape)
        assert np.abs(got - expected).max() < 2e-5, op
        if op.n > 2:  # positive control
            assert np.abs(np.roll(got, 1, 1) - expected).max() > 2e-5


@pytest.mark.parametrize("lanes", [4, 16])
def test_layer_normalization_of_equal_elements_is_its_bias(lanes: int, tmp_path: Path) -> None:
    """Their mean is their value: what is left of a mean that is rounded is divided by √ε."""
    op = LayerNormOp(200, 3, 1e-12, True)
    values = np.random.default_rng(2)
    x = values.standard_normal((op.rows, 1)).astype(np.float32).repeat(op.n, 1)
    scale, bias = values.standard_normal((2, op.n)).astype(np.float32)
    got = Kernels([op], target_with(lanes, 16), tmp_path).run(0, [x], [scale, bias], [], x.size)
    np.testing.assert_array_equal(got.reshape(x.shape), np.broadcast_to(bias, x.shape))
    times = x.sum(1) * np.float32(1 / op.n)  # positive control: what is to be avoided
    assert (times != x[:, 0]).any()


def test_every_template_is_reached_by_these_tests() -> None:
    from edgepipe.kernels.template import templates

    covered = {
        "conv",
        "conv_transpose",
        "packed_conv",
        "winograd",
        "depthwise",
        "resize",
        "pool",
        "global_pool",
        "map",
        "relayout",
        "matmul",
        "narrow",
        "rows",
        *test_integer_templates.TEMPLATES,
        *test_sparse_templates.TEMPLATES,
    }
    assert {t.name for t in templates()} == covered
