"""Integer templates against NumPy, code by code, borders included; other targets run whole layers
in tests/lowering/test_integers.py."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe import bilinear
from edgepipe.kernels import dot, qconv, qsparse, qsparse_gemv, qwinograd
from edgepipe.kernels.integer_ops import (
    DequantizeOp,
    Limits,
    MoveOp,
    QAddOp,
    QConvOp,
    QMatmulOp,
    QMulOp,
    QPoolOp,
    QResizeOp,
    QTableOp,
    QuantizeOp,
    Residual,
)
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.template import select
from edgepipe.target import Integer, Simd, Target
from tests.kernels.harness import Kernels

Array = np.ndarray[Any, np.dtype[Any]]

TEMPLATES = {
    "codes",
    "q_conv",
    "q_depthwise",
    "q_depthwise_dot",
    "q_elementwise",
    "q_image",
    "q_matmul",
    "q_pool",
    "q_resize",
    "q_sparse",
    "q_sparse_gemv",
    "q_winograd",
}

#: What the host is told to sum products with: its own way, and int16 pairs for weights beyond 7.
HOST = Target.load("host")
PAIRS = dataclasses.replace(HOST, integer=Integer("maddubs", "uint8", 4))
BYTES = dataclasses.replace(HOST, integer=Integer("maddubs", "uint8", 63))


def codes(
    n: int, c: int, h: int, w: int, zero: int, pads: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> Blocked:
    lanes = c if c <= 2 else 4 if c <= 4 else -(-c // 8) * 8
    return Blocked(n, c, h, w, lanes, pads, "uint8", zero)


def draw(rng: np.random.Generator, layout: Blocked) -> Array:
    shape = (layout.n, layout.c, layout.h, layout.w)
    limits = np.iinfo(layout.dtype)
    return rng.integers(limits.min, limits.max + 1, shape).astype(layout.dtype)


def rounded(total: Array, limits: Limits, zero: int, dtype: str = "uint8") -> Array:
    return (np.clip(np.rint(total), limits.low, limits.high) + zero).astype(dtype)


def centred(x: Array, layout: Blocked) -> Array:
    return x.astype(np.int32) - layout.zero


def check(
    kernels: Kernels, index: int, y: Blocked, inputs: list[Array], weights: list[Array],
    residuals: list[Array], expected: Array,
) -> None:  # fmt: skip
    """Exact equality inside, the zero point in the border; one code off must be seen."""
    out = kernels.run(index, inputs, weights, residuals, y.elements, y.dtype)
    got = y.unpack(out)
    assert np.array_equal(got, expected), kernels.ops[index]
    outside = np.ones(y.shape, bool)
    top, left, bottom, right = y.pads
    outside[:, :, top : y.rows - bottom, left : y.cols - right] = False
    assert (out.reshape(y.shape)[outside] == y.zero).all()
    wrong = got.copy()
    wrong.flat[0] = wrong.flat[0] - 1 if wrong.flat[0] > 0 else 1
    assert not np.array_equal(wrong, expected)


def conv_op(rng: random.Random, kind: str, limit: int) -> QConvOp:
    kernel = (1, 1) if kind == "pointwise" else (rng.choice([1, 2, 3]), rng.choice([1, 3, 4]))
    strides = (rng.choice([1, 2]), rng.choice([1, 2]))
    dilations = (1, 1) if kind == "pointwise" else (rng.choice([1, 2]), rng.choice([1, 1, 2]))
    pads = (*(rng.randrange(k) for k in kernel), *(rng.randrange(k) for k in kernel))
    groups, c, co = 1, rng.choice([1, 3, 16, 20, 33]), rng.choice([8, 24, 41])
    if kind == "grouped":
        groups, c, co = 2, 16, 2 * rng.choice([8, 24])
    if kind == "depthwise":
        groups = c = co = rng.choice([5, 16, 24])
    if c == 1:  # its taps are read four at a time
        dilations = (dilations[0], 1)
    h, w = rng.randint(6, 9), rng.randint(9, 14)
    size = [
        (s + pads[a] + pads[a + 2] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1
        for a, s in enumerate((h, w))
    ]
    x = codes(rng.choice([1, 2]), c, h, w, rng.randrange(256), pads)
    y = codes(x.n, co, *size, rng.randrange(256), rng.choice([(0, 0, 0, 0), (1, 2, 0, 1)]))
    residuals = ()
    if rng.random() < 0.5:
        residuals = (Residual(codes(x.n, co, *size, 9), float(np.float32(0.37))),)
    limits = Limits(-y.zero, 255 - y.zero, rng.random() < 0.5)
    if rng.random() < 0.3:
        y = Blocked(x.n, co, *size, 8)
        limits = Limits(-np.inf, np.inf)
    return QConvOp(x, y, kernel, limits, strides, dilations, pads[:2], groups,
                   4 if limit == 8 else 8, limit, residuals)  # fmt: skip


def convolved(op: QConvOp, x: Array, w: Array) -> Array:
    """int64 [n, co, h, w]."""
    top, left, bottom, right = op.x.pads
    grown = np.pad(centred(x, op.x).astype(np.int64),
                   ((0, 0), (0, 0), (top, bottom), (left, right)))  # fmt: skip
    total = np.zeros((op.y.n, op.y.c, op.y.h, op.y.w), np.int64)
    per_in, per_out = op.x.c // op.groups, op.y.c // op.groups
    for ky in range(op.kernel[0]):
        for kx in range(op.kernel[1]):
            first = top - op.offset[0] + ky * op.dilations[0]
            second = left - op.offset[1] + kx * op.dilations[1]
            rows = slice(first, first + (op.y.h - 1) * op.strides[0] + 1, op.strides[0])
            columns = slice(second, second + (op.y.w - 1) * op.strides[1] + 1, op.strides[1])
            for g in range(op.groups):
                part = grown[:, g * per_in : (g + 1) * per_in, rows, columns]
                weight = w[g * per_out : (g + 1) * per_out, :, ky, kx].astype(np.int64)
                total[:, g * per_out : (g + 1) * per_out] += np.einsum(
                    "nchw,oc->nohw", part, weight
                )
    return total


def check_convolution(
    kernels: Kernels, index: int, op: QConvOp, w: Array, rng: np.random.Generator
) -> None:
    x = draw(rng, op.x)
    b = rng.integers(-2000, 2000, op.y.c).astype(np.int32)
    m = rng.uniform(0.5, 2, op.y.c) * 100 / (op.limit * 70 * np.sqrt(w[0].size))
    m = m.astype(np.float32)
    added = [draw(rng, r.layout) for r in op.residuals]
    total = (convolved(op, x, w) + b[:, None, None]).astype(np.float32) * m[:, None, None]
    for r, a in zip(op.residuals, added, strict=True):
        total = total + centred(a, r.layout).astype(np.float32) * np.float32(r.multiplier)
    float_out = op.y.dtype == "float32"
    expected = total if float_out else rounded(total, op.limits, op.y.zero, op.y.dtype)
    packed = [r.layout.pack(a) for r, a in zip(op.residuals, added, strict=True)]
    check(kernels, index, op.y, [op.x.pack(x)], [w, b, m], packed, expected)


@pytest.mark.parametrize("kind", ["pointwise", "regular", "grouped", "depthwise"])
@pytest.mark.parametrize(
    ("target", "limit"),
    [(HOST, 8), (HOST, 63), (HOST, 127), (PAIRS, 8)],
    ids=["4-bit", "7-bit", "8-bit", "4-bit-pairs"],
)
def test_convolution(kind: str, target: Target, limit: int, tmp_path: Path) -> None:
    choices, rng = random.Random(f"{kind}{limit}"), np.random.default_rng(7)
    ops = [conv_op(choices, kind, limit) for _ in range(8)]
    kernels = Kernels(list(ops), target, tmp_path)
    for index, op in enumerate(ops):
        low, high = (-8, 7) if limit == 8 else (-limit, limit)
        shape = (op.y.c, op.x.c // op.groups, *op.kernel)
        w = rng.integers(low, high + 1, shape).astype(np.int8)
        check_convolution(kernels, index, op, w, rng)


def winograd_op(rng: random.Random, limit: int) -> QConvOp:
    """Odd sides, channels that do not fill a vector, more border than is needed."""
    c, co = rng.choice([32, 33, 44, 64]), rng.choice([32, 40, 41])
    h, w = rng.choice([(10, 10), (9, 12), (2, 51), (11, 13)])
    offset = (rng.choice([0, 1, 2]), rng.choice([0, 1, 2]))
    held = [max(2, s + 2 - o - rng.choice([0, 1])) for s, o in zip((h, w), offset, strict=True)]
    pads = (*offset, h + 2 - offset[0] - held[0], w + 2 - offset[1] - held[1] + 1)
    x = codes(rng.choice([1, 2]), c, *held, rng.randrange(256), pads)
    y = codes(x.n, co, h, w, rng.randrange(256), rng.choice([(0, 0, 0, 0), (1, 2, 0, 1)]))
    residuals = ()
    if rng.random() < 0.5:
        residuals = (Residual(codes(x.n, co, h, w, 9), float(np.float32(0.37))),)
    limits = Limits(-y.zero, 255 - y.zero, rng.random() < 0.5)
    if rng.random() < 0.3:
        y = Blocked(x.n, co, h, w, 8)
        limits = Limits(-np.inf, np.inf)
    bits = 4 if limit == 8 else 8
    return QConvOp(x, y, (3, 3), limits, (1, 1), (1, 1), offset, 1, bits, limit, residuals)


@pytest.mark.parametrize("limit", [8, 63, 127], ids=["4-bit", "7-bit", "8-bit"])
def test_winograd(limit: int, tmp_path: Path) -> None:
    choices, rng = random.Random(limit), np.random.default_rng(8)
    ops = [winograd_op(choices, limit) for _ in range(4)]
    assert all(select(op, BYTES)[0] is qwinograd.TEMPLATE for op in ops)
    every = [
        (op, knobs)
        for op in ops
        for knobs in (qwinograd.default(op, BYTES),
                      *choices.sample(qwinograd.TEMPLATE.settings(op, BYTES)[1:], 2))
    ]  # fmt: skip
    kernels = Kernels([op for op, _ in every], BYTES, tmp_path, [knobs for _, knobs in every])
    low, high = (-8, 7) if limit == 8 else (-limit, limit)
    for index, (op, _) in enumerate(every):
        w = rng.integers(low, high + 1, (op.y.c, op.x.c, 3, 3)).astype(np.int8)
        check_convolution(kernels, index, op, w, rng)


def test_winograd_at_the_edge_of_int32(tmp_path: Path) -> None:
    """The largest codes in as many channels as are taken; with more it is not."""
    x = codes(1, 920, 10, 10, 0, (1, 1, 1, 1))
    op = QConvOp(x, Blocked(1, 32, 10, 10, 8), (3, 3), Limits(-np.inf, np.inf), offset=(1, 1))
    assert select(op, BYTES)[0] is qwinograd.TEMPLATE
    wider = dataclasses.replace(op, x=codes(1, 928, 10, 10, 0, (1, 1, 1, 1)))
    assert "q_winograd: its sums may leave int32" in select(wider, BYTES)[1]
    kernels = Kernels([op], BYTES, tmp_path)
    b, m = np.zeros(32, np.int32), np.full(32, 2.0**-12, np.float32)
    for w in np.full((32, 920, 3, 3), 127, np.int8), np.full((32, 920, 3, 3), -127, np.int8):
        full = np.full((1, 920, 10, 10), 255, np.uint8)
        expected = convolved(op, full, w).astype(np.float32) * m[:, None, None]
        check(kernels, 0, op.y, [op.x.pack(full)], [w, b, m], [], expected)


@pytest.mark.parametrize("name", ["x86-64-v3", "wasm-simd", "raspberry-pi-4", "raspberry-pi-3-32"])
def test_winograd_takes_any_number_of_channels(name: str) -> None:
    """Parts of them, and register tiles in these, without a rest."""
    target = Target.load(name)
    for channels in range(32, 920, 8):
        x, y = codes(1, channels, 7, 20, 0), codes(1, channels, 5, 18, 0)
        op = QConvOp(x, y, (3, 3), Limits(0, 255))
        assert select(op, target)[0] is qwinograd.TEMPLATE
        for knobs in qwinograd.TEMPLATE.settings(op, target):
            vectors = channels // knobs["lanes"]
            assert vectors % (knobs["splits"] * knobs["blocks"]) == 0
            assert 1 <= knobs["rows"] <= 3 and 1 <= knobs["pixels"] <= 9 * knobs["rows"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"strides": (2, 1)}, "it has strides"),
        ({"y": codes(1, 64, 1, 64, 0)}, "smaller than a tile"),
        ({"y": codes(1, 31, 14, 14, 0)}, "fewer than 32 channels"),
        ({"y": codes(1, 64, 8, 12, 0)}, "or 25 tiles"),
        ({"x": Blocked(1, 36, 14, 14, 36, (1, 1, 1, 1), "uint8")}, "fill vectors of 8"),
        ({"kernel": (3, 4)}, ""),
        ({"groups": 2}, ""),
    ],
)
def test_what_winograd_leaves_to_others(changes: dict[str, Any], why: str) -> None:
    x, y = codes(1, 64, 14, 14, 3, (1, 1, 1, 1)), codes(1, 64, 14, 14, 5)
    op = QConvOp(x, y, (3, 3), Limits(-5, 250), offset=(1, 1))
    for target in BYTES, Target.load("raspberry-pi-4"), Target.load("wasm-simd"):
        assert select(op, target)[0] is qwinograd.TEMPLATE
    for cheap in "raspberry-pi-5", "wasm-relaxed":
        assert select(op, Target.load(cheap))[0] is qconv.TEMPLATE
    template, reasons = select(dataclasses.replace(op, **changes), BYTES)
    assert template is qconv.TEMPLATE
    told = next((r for r in reasons if r.startswith("q_winograd")), "")
    assert why in told and bool(why) == bool(told)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("limit", [8, 127], ids=["4-bit", "8-bit"])
@pytest.mark.parametrize("kind", ["pointwise", "regular"])
def test_convolution_of_packed_inputs(kind: str, limit: int, groups: int, tmp_path: Path) -> None:
    """Strips that end in the middle of an image, with pairs of int16 by eight channels."""
    choices, rng = random.Random(f"{kind}{limit}"), np.random.default_rng(9)
    ops: list[QConvOp] = []
    settings = []
    while len(ops) < 8:
        op = conv_op(choices, kind, limit)
        knobs = qconv.default(op, PAIRS)
        columns, rows = (op.y.h * op.y.w, 1) if knobs["flat"] else (op.y.w, op.y.h)
        pixels = choices.choice([2, 4])
        if columns < pixels or op.y.lanes * op.y.blocks < 8 * groups:
            continue
        whole = columns if knobs["flat"] else rows
        strip = choices.randrange(pixels if knobs["flat"] else 1, whole + 1)
        settings.append({**knobs, "pixels": pixels, "groups": groups, "strip": strip})
        ops.append(op)
    assert {knobs["dot"] for knobs in settings} == {"pairs"}
    kernels = Kernels(list(ops), PAIRS, tmp_path, settings)
    for index, op in enumerate(ops):
        low, high = (-8, 7) if limit == 8 else (-limit, limit)
        w = rng.integers(low, high + 1, (op.y.c, op.x.c, *op.kernel)).astype(np.int8)
        check_convolution(kernels, index, op, w, rng)


@pytest.mark.parametrize("outputs", [5, 16, 33, 48, 80, 112])
def test_widest_vectors(outputs: int) -> None:
    """Emitted, for processors that need not be here: any number of them in a register tile."""
    target = dataclasses.replace(HOST, simd=Simd(16, 32, True), integer=Integer("vnni", "uint8"))
    x, y = codes(1, 32, 3, 7, 128), codes(1, outputs, 3, 7, 5)
    op = QConvOp(x, y, (1, 1), Limits(-5, 250), (1, 1), (1, 1), (0, 0), 1, 8, 127, ())
    template, _ = select(op, target)
    assert template is not None and template.name.startswith("q_")
    for knobs in (template.default(op, target), *template.knobs(op, target)):
        template.emit(op, knobs)


def block_ops(kind: str, limit: int) -> tuple[list[QConvOp], list[Array]]:
    """Convolutions with blocks of zeros, and their weights."""
    choices, rng = random.Random(f"{kind}{limit}"), np.random.default_rng(8)
    ops, weights = list[QConvOp](), list[Array]()
    while len(ops) < 8:
        op = conv_op(choices, kind, limit)
        if op.x.c < 4:
            continue
        low, high = (-8, 7) if limit == 8 else (-limit, limit)
        kept = rng.random((op.y.c, -(-op.x.c // 4), *op.kernel)) < 0.3
        kept[0], kept[1], kept[-1] = False, True, False
        w = rng.integers(low, high + 1, (op.y.c, op.x.c, *op.kernel))
        w = (w * kept.repeat(4, 1)[:, : op.x.c]).astype(np.int8)
        ops.append(dataclasses.replace(op, stored=qsparse.blocks(w)))
        weights.append(w)
    return ops, weights


@pytest.mark.parametrize("kind", ["pointwise", "regular"])
@pytest.mark.parametrize(
    ("target", "limit"),
    [(HOST, 8), (HOST, 63), (HOST, 127), (PAIRS, 8)],
    ids=["4-bit", "7-bit", "8-bit", "4-bit-pairs"],
)
def test_convolution_over_blocks(kind: str, target: Target, limit: int, tmp_path: Path) -> None:
    """Some channels without a block, some with all of them; codes as the dense kernel's."""
    ops, weights = block_ops(kind, limit)
    kernels = Kernels(list(ops), target, tmp_path)
    for index, (op, w) in enumerate(zip(ops, weights, strict=True)):
        assert kernels.templates[index].name == "q_sparse"
        check_convolution(kernels, index, op, w, np.random.default_rng(index))


@pytest.mark.parametrize(
    ("target", "limit"),
    [(HOST, 8), (HOST, 63), (HOST, 127), (PAIRS, 8)],
    ids=["4-bit", "7-bit", "8-bit", "4-bit-pairs"],
)
def test_one_pixel_over_blocks(target: Target, limit: int, tmp_path: Path) -> None:
    """Classifiers, with borders and residuals as squeezed images have them, and one that reads the
    border; codes and floats."""
    rng = np.random.default_rng(9)
    low, high = (-8, 7) if limit == 8 else (-limit, limit)
    ops, weights = [], []
    none, border = (0, 0, 0, 0), (1, 0, 0, 2)
    for c, co, pads, offset in (
        (16, 8, none, (0, 0)), (40, 41, border, (0, 0)), (40, 41, border, (1, 0)),
        (1200, 10, none, (0, 0)),
    ):  # fmt: skip
        for kind in ("codes", "added", "float32"):
            x = codes(1, c, 1, 1, int(rng.integers(256)), pads)
            y = codes(1, co, 1, 1, int(rng.integers(256)), pads)
            limits = Limits(-y.zero, 255 - y.zero, kind == "codes")
            if kind == "float32":
                y, limits = Blocked(1, co, 1, 1, co), Limits(-np.inf, np.inf)
            residual = Residual(codes(1, co, 1, 1, 9), float(np.float32(0.37)))
            added = (residual,) if kind == "added" else ()
            kept = rng.random((co, -(-c // 4))) < 0.3
            kept[0], kept[1], kept[-1] = False, True, False
            w = rng.integers(low, high + 1, (co, c)) * kept.repeat(4, 1)[:, :c]
            weights.append(w.astype(np.int8)[:, :, None, None])
            stored = qsparse_gemv.blocks(weights[-1])
            ops.append(
                QConvOp(
                    x, y, (1, 1), limits, offset=offset, limit=limit, residuals=added, stored=stored
                )
            )
    kernels = Kernels(list(ops), target, tmp_path)
    for index, (op, w) in enumerate(zip(ops, weights, strict=True)):
        assert kernels.templates[index].name == "q_sparse_gemv"
        check_convolution(kernels, index, op, w, rng)


@pytest.mark.parametrize("target", [HOST, PAIRS], ids=["host", "pairs"])
def test_codes_that_do_not_fill_a_vector_are_refused(target: Target) -> None:
    """A kernel would read or write a neighbour's: outputs and what is added to them alike."""
    lanes = dot.choose(target, 127, 64).lanes

    def reason(outputs: int, added: int) -> str | None:
        y = Blocked(1, 64, 4, 4, outputs, dtype="uint8", zero=3)
        residual = Residual(Blocked(1, 64, 4, 4, added, dtype="uint8", zero=9), 0.5)
        op = QConvOp(codes(1, 16, 4, 4, 3), y, (1, 1), Limits(-3, 252), residuals=(residual,))
        return qconv.TEMPLATE.matches(op, target)

    assert reason(64, 64) is None and reason(64, lanes) is None
    short = f"the channels of what is added do not fill a vector of {lanes}"
    assert reason(64, lanes // 2) == short


@pytest.mark.parametrize("target", [HOST, PAIRS], ids=["host", "pairs"])
def test_product_of_two_activations(target: Target, tmp_path: Path) -> None:
    choices, rng = random.Random(11), np.random.default_rng(11)
    ops = []
    for index in range(8):
        batch, m = choices.choice([1, 3]), choices.choice([1, 5, 19])
        k, n = choices.choice([4, 18, 64]), choices.choice([8, 16, 29])
        shared = index % 2
        zeros = [choices.choice([0, 128, 255, choices.randrange(256)]) for _ in range(3)]
        a, b, y = (
            Blocked(1, c, 1, rows, c, dtype="uint8", zero=zero)
            for c, rows, zero in zip(
                (k, n, n), (batch * m, k if shared else batch * k, batch * m), zeros, strict=True
            )
        )
        limits = Limits(-y.zero, 255 - y.zero)
        if index > 5:
            y, limits = Blocked(1, n, 1, batch * m, n), Limits(-np.inf, np.inf)
        scale = float(np.float32(3.0 / (70 * 70 * np.sqrt(k)) * 40))
        ops.append(QMatmulOp(a, b, y, batch, 1 if shared else batch, m, k, n, scale, limits))
    kernels = Kernels(list(ops), target, tmp_path)
    for index, op in enumerate(ops):
        left, right = (draw(rng, layout) for layout in (op.a, op.b))
        a = centred(left, op.a)[0, :, 0].T.reshape(op.batch, op.m, op.k).astype(np.int64)
        b = centred(right, op.b)[0, :, 0].T.reshape(op.b_batch, op.k, op.n).astype(np.int64)
        total = (a @ b).reshape(-1, op.n).T[None, :, None]
        value = total.astype(np.float32) * np.float32(op.multiplier)
        if op.y.dtype == "uint8":
            value = rounded(value, op.limits, op.y.zero)
        check(kernels, index, op.y, [op.a.pack(left), op.b.pack(right)], [], [], value)


def test_sums_products_and_tables(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    a, b = codes(1, 24, 5, 6, 7), codes(1, 24, 5, 6, 200, (1, 0, 0, 1))
    y, gate = codes(1, 24, 5, 6, 30, (1, 1, 1, 1)), codes(1, 24, 1, 1, 3)
    limits = Limits(-30, 225, True)
    first, second, scale = (np.float32(v) for v in (0.31, -0.7, 0.004))
    ops = [
        QAddOp((Residual(a, float(first)), Residual(b, float(second))), y, limits),
        QMulOp(a, gate, y, float(scale), limits),
        QTableOp(a, y),
    ]
    kernels = Kernels(list(ops), HOST, tmp_path)
    xa, xb, xg = draw(rng, a), draw(rng, b), draw(rng, gate)
    total = centred(xa, a).astype(np.float32) * first + centred(xb, b).astype(np.float32) * second
    check(kernels, 0, y, [a.pack(xa), b.pack(xb)], [], [], rounded(total, limits, y.zero))
    product = (centred(xa, a) * centred(xg, gate)).astype(np.float32) * scale
    check(kernels, 1, y, [a.pack(xa), gate.pack(xg)], [], [], rounded(product, limits, y.zero))
    table = rng.integers(0, 256, 256).astype(np.uint8)
    check(kernels, 2, y, [a.pack(xa)], [table], [], table[xa])


def test_pooling(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    x, y = codes(1, 24, 8, 9, 100, (1, 1, 0, 0)), codes(1, 24, 4, 4, 20, (0, 1, 1, 0))
    one, limits = codes(1, 24, 1, 1, 20), Limits(-20, 235)
    scale = np.float32(0.21)
    ops = [
        QPoolOp("max", x, dataclasses.replace(y, zero=100), (3, 3), (2, 2), (1, 1)),
        QPoolOp("average", x, y, (2, 3), (2, 2), (1, 1), float(scale), limits),
        QPoolOp("average", x, one, (8, 9), (1, 1), (0, 0), float(scale), limits),
    ]
    kernels = Kernels(list(ops), HOST, tmp_path)
    values = draw(rng, x)
    grown = np.pad(centred(values, x), ((0, 0), (0, 0), (1, 0), (1, 0)))
    low = np.pad(values.astype(int), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)

    def windows(array: Array, size: tuple[int, int]) -> Array:
        view = np.lib.stride_tricks.sliding_window_view(array, size, (2, 3))
        return view[:, :, ::2, ::2][:, :, :4, :4]

    largest = windows(low, (3, 3)).max((-1, -2)).astype(np.uint8)
    check(kernels, 0, ops[0].y, [x.pack(values)], [], [], largest)
    mean = windows(grown, (2, 3)).sum((-1, -2)).astype(np.float32) * scale
    check(kernels, 1, y, [x.pack(values)], [], [], rounded(mean, limits, 20))
    whole = centred(values, x).sum((2, 3), keepdims=True).astype(np.float32) * scale
    check(kernels, 2, one, [x.pack(values)], [], [], rounded(whole, limits, 20))


@pytest.mark.parametrize(
    "c", [3, 40, *(pytest.param(c, marks=pytest.mark.slow) for c in (1, 8, 19))]
)
def test_bilinear_resizing(c: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(c)
    x, ops, modes = codes(2, c, 5, 6, 77, (1, 1, 0, 2)), [], []
    for mode in bilinear.TRANSFORMS:
        for h, w in ((10, 12), (7, 13), (3, 6), (1, 1)):
            y = codes(2, c, h, w, 77, (0, 1, 1, 0))
            ops.append(QResizeOp(x, y, 1.0, Limits(-77, 178)))
            modes.append(mode)
        y, plain = codes(2, c, 8, 9, 3), Blocked(2, c, 8, 9, 1)
        ops.append(QResizeOp(x, y, float(np.float32(0.7)), Limits(-3, 100)))
        ops.append(QResizeOp(x, plain, float(np.float32(0.05)), Limits(-np.inf, 2.5)))
        modes += [mode, mode]
    kernels, values = Kernels(list(ops), HOST, tmp_path), draw(rng, x)
    for i, (op, mode) in enumerate(zip(ops, modes, strict=True)):
        size = op.y.h, op.y.w
        tables = bilinear.both_tables(mode, (x.h, x.w), size)
        wide = bilinear.interpolate(centred(values, x).astype(np.float32), mode, size)
        total = wide * np.float32(op.multiplier)
        if op.y.dtype == "uint8":
            expected = rounded(total, op.limits, op.y.zero)
            check(kernels, i, op.y, [x.pack(values)], tables, [], expected)
        else:
            got = kernels.run(i, [x.pack(values)], tables, [], op.y.elements)
            np.testing.assert_array_equal(op.y.unpack(got), np.minimum(total, np.float32(2.5)))


@pytest.mark.parametrize("c", [1, 3, 16, 19])
def test_quantisation_and_copies(c: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(c)
    plain, padded = Blocked(1, c, 5, 13, 1), codes(1, c, 5, 13, 40, (1, 0, 1, 2))
    flat = Blocked(1, c, 5, 13, 1, (0, 0, 0, 0), "uint8", 40)
    both, large = codes(1, 2 * c, 5, 13, 40), codes(1, c, 10, 26, 40)
    scale = np.float32(0.05)
    ops = [
        QuantizeOp(plain, padded, float(scale)),
        DequantizeOp(padded, plain, float(scale)),
        MoveOp((padded,), flat),
        MoveOp((flat,), padded),
        MoveOp((padded, padded), both),
        MoveOp((padded,), large, (2, 2)),
    ]
    kernels = Kernels(list(ops), HOST, tmp_path)
    x = (rng.standard_normal((1, c, 5, 13)) * 6).astype(np.float32)
    x.flat[:4] = [1e30, -1e30, 0.025, 0.075]
    q = (np.clip(np.rint(x / scale), -40, 215) + 40).astype(np.uint8)
    check(kernels, 0, padded, [plain.pack(x)], [], [], q)
    check(
        kernels, 1, plain, [padded.pack(q)], [], [], centred(q, padded).astype(np.float32) * scale
    )
    check(kernels, 2, flat, [padded.pack(q)], [], [], q)
    check(kernels, 3, padded, [flat.pack(q)], [], [], q)
    check(kernels, 4, both, [padded.pack(q)] * 2, [], [], np.concatenate([q, q], 1))
    check(kernels, 5, large, [padded.pack(q)], [], [], q.repeat(2, 2).repeat(2, 3))


@pytest.mark.parametrize(("c", "lanes"), [(3, 8), (20, 16), (20, 4), (24, 16)])
def test_vectors_filled_up_differently(c: int, lanes: int, tmp_path: Path) -> None:
    """Floats in vectors of ``lanes`` and codes: neither is written beyond its last pixel."""
    rng = np.random.default_rng(c + lanes)
    blocked, packed = Blocked(2, c, 3, 5, lanes), codes(2, c, 3, 5, 40, (0, 1, 0, 0))
    scale = np.float32(0.05)
    kernels = Kernels([QuantizeOp(blocked, packed, float(scale))], HOST, tmp_path)
    x = (rng.standard_normal((2, c, 3, 5)) * 6).astype(np.float32)
    q = (np.clip(np.rint(x / scale), -40, 215) + 40).astype(np.uint8)
    check(kernels, 0, packed, [blocked.pack(x)], [], [], q)


def test_rows_that_are_no_whole_vectors(tmp_path: Path) -> None:
    """37 values in a row: the last vector overlaps, and writes nothing beyond."""
    rng = np.random.default_rng(7)
    rows = Blocked(1, 37, 1, 9, 37)
    row_codes = Blocked(1, 37, 1, 9, 37, (0, 0, 0, 0), "uint8", 40)
    scale = np.float32(0.05)
    ops = [QuantizeOp(rows, row_codes, float(scale)), DequantizeOp(row_codes, rows, float(scale))]
    kernels = Kernels(list(ops), HOST, tmp_path)
    assert all(knobs["lanes"] == 16 for knobs in kernels.knobs)
    x = (rng.standard_normal((1, 37, 1, 9)) * 6).astype(np.float32)
    q = (np.clip(np.rint(x / scale), -40, 215) + 40).astype(np.uint8)
    check(kernels, 0, row_codes, [rows.pack(x)], [], [], q)
    value = centred(q, row_codes).astype(np.float32) * scale
    check(kernels, 1, rows, [row_codes.pack(q)], [], [], value)
