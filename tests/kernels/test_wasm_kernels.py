"""Kernels that a relaxed bundle has in two forms, over the same weights: each against NumPy."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepipe.kernels import qconv, winograd_loops
from edgepipe.kernels.integer_ops import QConvOp, Residual
from edgepipe.kernels.layout import Blocked
from edgepipe.target import Target
from tests.kernels.harness import InWasmtime
from tests.kernels.test_integer_templates import check_convolution, conv_op, winograd_op

pytestmark = pytest.mark.needs_wasmtime

RELAXED = Target.load("wasm-relaxed")


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
