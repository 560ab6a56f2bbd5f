"""Kernels of WebAssembly against NumPy; those that a relaxed bundle has in two forms, over the same
weights, in both."""

from __future__ import annotations

import platform
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepipe.kernels import qconv, qdepthwise, winograd_loops
from edgepipe.kernels.integer_ops import Limits, QConvOp, Residual
from edgepipe.kernels.layout import Blocked
from edgepipe.target import Target
from tests.kernels.harness import InWasmtime, wasm_store
from tests.kernels.test_integer_templates import (
    block_ops,
    check_convolution,
    conv_op,
    winograd_op,
)

pytestmark = pytest.mark.needs_wasmtime

RELAXED, SIMD = Target.load("wasm-relaxed"), Target.load("wasm-simd")


def signed(op: QConvOp) -> QConvOp:
    """The same with codes of int8, as WebAssembly has them."""

    def moved(layout: Blocked) -> Blocked:
        if layout.dtype != "uint8":
            return layout
        return replace(layout, dtype="int8", zero=layout.zero - 128)

    residuals = tuple(Residual(moved(r.layout), r.multiplier) for r in op.residuals)
    return replace(op, x=moved(op.x), y=moved(op.y), residuals=residuals)


@pytest.mark.parametrize("variant", ["", "relaxed"], ids=["plain", "relaxed"])
@pytest.mark.parametrize("limit", [8, 63], ids=["4-bit", "7-bit"])
@pytest.mark.parametrize("kind", ["pointwise", "regular", "3x3", "3x3 in parts"])
def test_convolutions_in_both_forms(
    kind: str, limit: int, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "3x3 in parts":  # a few channels' transformed weights at a time
        monkeypatch.setattr(winograd_loops, "_WEIGHT_BYTES", 1 << 15)
    choices, rng = random.Random(f"{kind}{limit}"), np.random.default_rng(9)
    ops: list[QConvOp] = []
    settings = []
    while len(ops) < 8:
        op = winograd_op(choices, limit) if "3x3" in kind else conv_op(choices, kind, limit)
        op = signed(op)
        if qconv.matches(op, RELAXED) is not None:
            continue
        knobs = qconv.default(op, RELAXED)
        assert knobs["offset"] and knobs["winograd"] == ("3x3" in kind)
        if len(ops) % 4 == 2:  # the same without Winograd's transforms
            knobs["winograd"] = False
        if len(ops) % 4 == 3:  # as records have it from before its tiles were told apart
            pixels, groups = max(1, knobs["relaxed"] // 2), knobs["stored"]
            strip = qconv.packed(op, pixels, knobs["flat"])
            knobs |= {"pixels": pixels, "groups": groups, "strip": strip}
            for name in ("relaxed", "stored", "winograd"):
                del knobs[name]
        settings.append(knobs)
        ops.append(op)
    assert any(knobs["stored"] > knobs["groups"] for knobs in settings if "stored" in knobs)
    kernels = InWasmtime(list(ops), RELAXED, variant, tmp_path, settings)
    low, high = (-8, 7) if limit == 8 else (-limit, limit)
    for index, op in enumerate(ops):
        w = rng.integers(low, high + 1, (op.y.c, op.x.c, *op.kernel)).astype(np.int8)
        check_convolution(kernels, index, op, w, rng)


@pytest.mark.parametrize("limit", [8, 127], ids=["4-bit", "8-bit"])
def test_convolutions_without_relaxed(limit: int, tmp_path: Path) -> None:
    """Inputs packed and not, of one channel too, and the largest products that there are."""
    choices, rng = random.Random(limit), np.random.default_rng(10)
    packed, plain, ops = [0, 0], 0, list[QConvOp]()
    while len(ops) < 24:
        op = signed(conv_op(choices, ("pointwise", "regular", "grouped")[len(ops) % 3], limit))
        if qconv.matches(op, SIMD) is not None:
            continue
        strip = qconv.default(op, SIMD)["strip"]
        packed[op.x.c == 1] += strip > 0
        plain += strip == 0
        ops.append(op)
    assert all(packed) and plain, "some are packed, of one channel and of more, and some are not"
    kernels = InWasmtime(list(ops), SIMD, "", tmp_path)
    low = -8 if limit == 8 else -limit
    for index, op in enumerate(ops):
        shape = (op.y.c, op.x.c // op.groups, *op.kernel)
        high = 7 if limit == 8 else limit
        w = rng.integers(low, high + 1, shape).astype(np.int8)
        check_convolution(kernels, index, op, w, rng)
        check_convolution(kernels, index, op, np.full(shape, low, np.int8), rng)


#: Relaxed products are told apart by how an engine reads the factor of seven bits.
FORMS = pytest.mark.parametrize(
    ("variant", "arm"),
    [("", False), ("relaxed", False), ("relaxed", True)],
    ids=["plain", "relaxed", "relaxed-arm"],
)


def test_engines_read_the_factor_of_seven_bits_in_two_ways() -> None:
    """What ``relaxed.Factors`` asks for, and both answers are there to be tested with."""
    import wasmtime

    text = """(module (func (export "told") (result i32) (i32x4.extract_lane 0
        (i32x4.relaxed_dot_i8x16_i7x16_add_s (i8x16.splat (i32.const 1))
        (i8x16.splat (i32.const -128)) (v128.const i64x2 0 0)))))"""

    def told(arm: bool) -> int:
        store = wasm_store(arm)
        module = wasmtime.Module(store.engine, text)
        return int(wasmtime.Instance(store, module, []).exports(store)["told"](store))

    assert told(arm=True) == -512
    assert told(arm=False) == (512 if platform.machine() in ("x86_64", "AMD64") else -512)


@FORMS
@pytest.mark.parametrize("kind", ["pointwise", "regular"])
@pytest.mark.parametrize("limit", [8, 63, 127], ids=["4-bit", "7-bit", "8-bit"])
def test_blocks_in_all_forms(
    kind: str, limit: int, variant: str, arm: bool, tmp_path: Path
) -> None:
    """Over weights of any sign, and over the smallest and largest alone."""
    rng = np.random.default_rng(12)
    ops, weights = block_ops(kind, limit)
    ops = [signed(op) for op in ops]
    kernels = InWasmtime(list(ops), RELAXED, variant, tmp_path, arm=arm)
    for index, (op, w) in enumerate(zip(ops, weights, strict=True)):
        assert kernels.templates[index].name == "q_sparse"
        check_convolution(kernels, index, op, w, rng)
        for end in (-limit, limit - (limit == 8)):
            check_convolution(kernels, index, op, np.where(w, end, 0).astype(np.int8), rng)


@FORMS
@pytest.mark.parametrize("limit", [8, 63, 127], ids=["4-bit", "7-bit", "8-bit"])
def test_depthwise_convolutions_in_all_forms(
    limit: int, variant: str, arm: bool, tmp_path: Path
) -> None:
    """Of every stride and one row, and the largest products that there are."""
    choices, rng, ops = random.Random(limit), np.random.default_rng(11), list[QConvOp]()
    while len(ops) < 24:
        op = signed(conv_op(choices, "depthwise", limit))
        if qdepthwise.matches(op, RELAXED) is None and "relaxed" in qdepthwise.default(op, RELAXED):
            ops.append(op)
    assert {op.strides for op in ops} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert {op.y.dtype for op in ops} == {"int8", "float32"} and any(op.residuals for op in ops)
    assert {op.kernel for op in ops} == {(3, 1), (3, 3), (3, 4)}
    kernels = InWasmtime(list(ops), RELAXED, variant, tmp_path, arm=arm)
    low, high = (-8, 7) if limit == 8 else (-limit, limit)
    for index, op in enumerate(ops):
        shape = (op.y.c, 1, *op.kernel)
        w = rng.integers(low, high + 1, shape).astype(np.int8)
        for weights in (w, np.full(shape, low, np.int8), np.full(shape, high, np.int8)):
            check_convolution(kernels, index, op, weights, rng)


def test_which_depthwise_convolutions_have_another_form() -> None:
    """Three rows of taps, side by side, over codes of int8 with channels in sixteens."""
    wide = Blocked(1, 32, 9, 9, 32, (1, 1, 1, 1), "int8", 0)
    small = Blocked(1, 32, 9, 9, 32, (0, 0, 0, 0), "int8", 0)
    op = QConvOp(wide, small, (3, 3), Limits(-128, 127, True), (1, 1), (1, 1), (1, 1), 32)
    assert qdepthwise.default(op, RELAXED)["relaxed"] == 2
    own = qdepthwise.variant(op, qdepthwise.default(op, RELAXED), "relaxed")
    assert own is not None and "relaxed.dot" in str(qdepthwise.emit(op, own))
    narrow = [replace(layout, c=24, lanes=24) for layout in (wide, small)]
    for other, target in (
        (op, SIMD),
        (replace(op, dilations=(2, 1)), RELAXED),
        (replace(op, kernel=(4, 3)), RELAXED),
        (replace(op, x=replace(wide, dtype="uint8", zero=128)), RELAXED),
        (replace(op, x=narrow[0], y=narrow[1], groups=24), RELAXED),
    ):
        knobs = qdepthwise.default(other, target)
        assert qdepthwise.variant(other, knobs, "relaxed") is None
