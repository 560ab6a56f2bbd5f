"""Kernels that read weights as codes or halves, against float64 on the weights these stand for."""

from __future__ import annotations

import ctypes
import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepipe.codegen.primfunc import build_object
from edgepipe.kernels import unpack, weights
from edgepipe.kernels.builder import kernel, load, loop, store
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, ConvTransposeOp, MatmulOp
from edgepipe.kernels.template import select
from edgepipe.kernels.weights import WeightFormat
from edgepipe.target import Target
from tests.kernels import reference
from tests.kernels.harness import FLOOR_DB, Kernels, aligned, snr_db, target_with
from tests.kernels.test_templates import VECTORS, check, conv_op, data

FORMATS = [
    WeightFormat("float16"),
    WeightFormat("int8"),
    WeightFormat("int4"),
    WeightFormat("int4", 32),
    WeightFormat("int8", 6),  # no multiple of any vector
]


def stored(
    rng: np.random.Generator, format: WeightFormat, w: np.ndarray, channel: int, inputs: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """``w`` as ``pack`` takes it in ``format``, and the float64 weights that this stands for.

    ``channel`` and ``inputs`` are the axes of output and input channels.
    """
    if format.kind == "float16":
        half = w.astype(np.float16)
        return [half], half.astype(np.float64)
    limit = 2 ** (format.bits - 1) - 1
    shape = [1] * w.ndim
    shape[channel] = w.shape[channel]
    if format.group:
        shape = list(w.shape)
        shape[inputs] = -(-w.shape[inputs] // format.group)
    spread = np.exp2(rng.uniform(-4, 0, shape)).astype(np.float32)
    scale = np.float32(np.abs(w).max() / limit) * spread
    expanded = scale
    if format.group:
        expanded = np.repeat(scale, format.group, inputs).take(range(w.shape[inputs]), inputs)
    codes = np.clip(np.rint(w / expanded), -limit - 1, limit).astype(np.int8)
    value = codes.astype(np.float64) * expanded.astype(np.float64)
    return [codes, scale if format.group else scale.reshape(-1)], value


def broken(arrays: list[np.ndarray], channel: int) -> list[np.ndarray]:
    """The same with the scales, or without scales the weights, of one output channel doubled."""
    wrong = [a.copy() for a in arrays]
    by_channel = np.moveaxis(wrong[-1], channel if wrong[-1].ndim > 1 else 0, 0)
    by_channel[np.abs(by_channel.reshape(len(by_channel), -1)).sum(1).argmax()] *= 2
    return wrong


def conv_ops(lanes: int, knobs: dict[str, object]) -> list[ConvOp]:
    rng, ops = random.Random(lanes), []
    for format in FORMATS:
        for kind in ("pointwise", "regular", "regular", "grouped", "depthwise"):
            if kind == "depthwise" and format.group:
                continue
            op = conv_op(rng, lanes, kind)
            if op.x.lanes != 4 and "by_element" in knobs:
                op = dataclasses.replace(op, x=dataclasses.replace(op.x, lanes=4))
            ops.append(dataclasses.replace(op, weights=format))
    # Several whole groups and a short one; 9 whole groups of 32; a big depthwise filter.
    x = Blocked(1, 70, 5, 9, lanes, (1, 1, 1, 1))
    grouped = WeightFormat("int4", 32)
    ops.append(
        ConvOp(x, Blocked(1, 3 * lanes, 5, 9, lanes), (3, 3), offset=(1, 1), weights=grouped)
    )
    x = Blocked(1, 288, 7, 7, lanes)
    ops.append(ConvOp(x, Blocked(1, 4 * lanes, 7, 7, lanes), (1, 1), weights=grouped))
    x = Blocked(1, 19, 9, 9, lanes, (3, 3, 3, 3))
    y = Blocked(1, 19, 9, 9, lanes)
    ops.append(ConvOp(x, y, (7, 7), offset=(3, 3), groups=19, weights=WeightFormat("int8")))
    return ops


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "registers", "knobs"), VECTORS)
def test_convolution(lanes: int, registers: int, knobs: dict[str, Any], tmp_path: Path) -> None:
    values = np.random.default_rng(lanes)
    ops = conv_ops(lanes, knobs)
    if lanes == 4:  # what targets without a half instruction do
        knobs = {**knobs, "half": "bits"}
    kernels = Kernels(ops, target_with(lanes, registers), tmp_path, **knobs)
    for i, op in enumerate(ops):
        x = data(values, op.x)
        scale = np.sqrt(2 / (op.x.c // op.groups * op.kernel[0] * op.kernel[1]))
        w = values.standard_normal((op.y.c, op.x.c // op.groups, *op.kernel)) * scale
        b = values.standard_normal(op.y.c).astype(np.float32)
        arrays, value = stored(values, op.weights, w.astype(np.float32), 0, 1)
        plain = reference.conv(x, value, b, op)
        check(op, kernels, i, plain, [op.x.pack(x)], [*arrays, b], values)
        if not op.epilogue:
            wrong = kernels.run(i, [op.x.pack(x)], [*broken(arrays, 0), b], [], op.y.elements)
            assert snr_db(plain, op.y.unpack(wrong)) < FLOOR_DB, op


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [4, 8])
def test_transposed_convolution(lanes: int, tmp_path: Path) -> None:
    rng, values, ops = random.Random(2), np.random.default_rng(2), []
    for format in FORMATS:
        for kernel_size, strides in (((2, 2), (2, 2)), ((3, 4), (2, 3)), ((1, 2), (2, 1))):
            x = Blocked(1, rng.choice([5, 40]), 3, 5, lanes)
            y = Blocked(1, rng.choice([3, 2 * lanes + 1]), 6, 11, lanes, (1, 0, 0, 1))
            op = ConvTransposeOp(x, y, kernel_size, strides, offset=(0, 1), weights=format)
            ops.append(dataclasses.replace(op, x=dataclasses.replace(x, pads=op.border())))
    kernels = Kernels(ops, target_with(lanes, 16), tmp_path, half="bits")
    for i, op in enumerate(ops):
        x = data(values, op.x)
        w = values.standard_normal((op.x.c, op.y.c, *op.kernel)).astype(np.float32) / 8
        b = values.standard_normal(op.y.c).astype(np.float32)
        arrays, value = stored(values, op.weights, w, 1, 0)
        plain = reference.conv_transpose(x, value, b, op)
        check(op, kernels, i, plain, [op.x.pack(x)], [*arrays, b], values)
        wrong = kernels.run(i, [op.x.pack(x)], [*broken(arrays, 1), b], [], op.y.elements)
        assert snr_db(plain, op.y.unpack(wrong)) < FLOOR_DB, op


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "registers", "knobs"), VECTORS)
def test_dense(lanes: int, registers: int, knobs: dict[str, Any], tmp_path: Path) -> None:
    values, ops = np.random.default_rng(lanes), []
    for format in FORMATS:
        for m, k, n in ((1, 70, 65), (7, 96, 33), (13, 21, 2), (2, 64, 128), (9, 33, 1)):
            bias = n != 33
            steps, kinds = ((Step("add"), Step("relu")), ("row",)) if n == 128 else ((), ())
            ops.append(MatmulOp(1, m, k, n, True, bias, epilogue=steps, residuals=kinds,
                                weights=format))  # fmt: skip
    kernels = Kernels(ops, target_with(lanes, registers), tmp_path, **knobs)
    for i, op in enumerate(ops):
        a = values.standard_normal((op.m, op.k), dtype=np.float32)
        w = values.standard_normal((op.k, op.n), dtype=np.float32)
        extra = [values.standard_normal(op.n, dtype=np.float32) for _ in range(2)]
        arrays, value = stored(values, op.weights, w, 1, 0)
        plain = a.astype(np.float64) @ value + (extra[0] if op.bias else 0)
        expected = reference.apply(op.epilogue, plain, extra[1:])
        bias, operands = extra[: int(op.bias)], extra[1:] if op.residuals else []
        got = kernels.run(i, [a], [*arrays, *bias], operands, op.m * op.n)
        assert snr_db(expected, got.reshape(expected.shape)) > FLOOR_DB, op
        if not op.epilogue:
            wrong = kernels.run(i, [a], [*broken(arrays, 1), *bias], operands, op.m * op.n)
            assert snr_db(expected, wrong.reshape(expected.shape)) < FLOOR_DB, op


@pytest.mark.parametrize("conversion", ["bits", "convert"])
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_every_finite_half_is_converted_exactly(
    conversion: str, lanes: int, tmp_path: Path
) -> None:
    """Subnormals and both zeros included."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]

    def body(source: Any, target: Any) -> None:
        with loop(halves.size // lanes) as i:
            bits = load(source, i * lanes, lanes)
            store(target, i * lanes, unpack.half_to_float(bits, lanes, conversion), lanes)

    function = kernel("halves", [("x", halves.size, "int16"), ("y", halves.size, "float32")], body)
    blob, _ = build_object({"halves": function}, Target.load("host"))
    (tmp_path / "k.o").write_bytes(blob)
    command = [sys.executable, "-m", "ziglang", "cc", "-shared", "-o", "k.so", "k.o"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    source, out = aligned(halves.view(np.int16)), aligned(np.zeros(halves.size, np.float32))
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (source, out)]
    ctypes.CDLL(str(tmp_path / "k.so")).halves(*pointers)
    np.testing.assert_array_equal(out.view(np.int32), halves.astype(np.float32).view(np.int32))


@pytest.mark.parametrize("rows", [1, 8, 9, 21])
def test_nibbles_hold_what_was_stored(rows: int) -> None:
    codes = np.random.default_rng(rows).integers(-8, 8, (rows, 5)).astype(np.int8)
    words = weights.store(WeightFormat("int4"), codes)
    assert words.shape == (-(-rows // 8), 5) and words.dtype == np.int32
    unpacked = np.stack([words << 28 - 4 * k >> 28 for k in range(8)], 1).reshape(-1, 5)
    np.testing.assert_array_equal(unpacked[:rows], codes)
    assert not unpacked[rows:].any()


def test_groups_whose_scale_vanishes_count_as_zero_and_disturb_no_other(tmp_path: Path) -> None:
    format = WeightFormat("int4", 4)
    op = MatmulOp(1, 2, 12, 8, True, weights=format)
    kernels = Kernels([op], target_with(8, 16), tmp_path)
    values = np.random.default_rng(0)
    a = values.standard_normal((2, 12), dtype=np.float32)
    codes = values.integers(-7, 8, (12, 8)).astype(np.int8)
    scale = np.full((3, 8), 0.25, np.float32)
    scale[:, :4] = [[1e-30], [0.5], [2.0]]
    scale[1, 4:6], scale[:, 6] = 0, 0
    expanded = np.repeat(scale, 4, 0).astype(np.float64)
    expected = a.astype(np.float64) @ (codes * expanded)
    got = kernels.run(0, [a], [codes, scale], [], 16).reshape(2, 8)
    assert snr_db(expected, got) > FLOOR_DB
    assert not got[:, 6].any()


def test_one_scale_per_group_is_no_depthwise_format() -> None:
    x = Blocked(1, 8, 5, 5, 8)
    op = ConvOp(x, x, (1, 1), groups=8, weights=WeightFormat("int4", 4))
    template, reasons = select(op, target_with(8, 16))
    assert template is None
    assert any("scale per group" in reason for reason in reasons)


def test_formats_name_themselves_for_the_audit() -> None:
    assert [str(f) for f in FORMATS[:4]] == [
        "float16",
        "int8 per channel",
        "int4 per channel",
        "int4 per 32 channels",
    ]
