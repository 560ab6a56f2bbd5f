"""What is not expected to be faster than float32 is said, and nothing where it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import edgepipe
from edgepipe.codegen.plan import KernelAudit, SparseAudit
from edgepipe.context import Context, Note
from edgepipe.kernels.integer_ops import Limits, QConvOp
from edgepipe.kernels.layout import Blocked
from edgepipe.lowering import pace
from edgepipe.recipe import Recipe
from edgepipe.target import Target

AUDIT = KernelAudit("c", "Conv", "q_conv_0", "int8", "int32", 100)


def said(recipe: str, *audits: KernelAudit) -> list[str]:
    notes: list[Note] = []
    pace.judge(audits, Context(Target.load("x86-64-v3"), Recipe.parse(recipe), notes=notes))
    assert all(note.warning for note in notes)
    return [note.text for note in notes]


def integers(integer: int, float32: int) -> KernelAudit:
    return replace(AUDIT, estimated_instructions={"integer": integer, "float32": float32})


def test_integers_that_take_more_instructions_are_said() -> None:
    (line,) = said("w8a8", integers(300, 100), AUDIT, integers(10, 100))
    assert "slower than float32 by estimate" in line and "1.55 times" in line
    assert said("w8a8", integers(100, 300), integers(104, 100), AUDIT) == []
    assert said("w8a8", AUDIT) == []


def test_zeros_that_no_kernel_leaves_out_are_said() -> None:
    dense, rows = (replace(AUDIT, sparsity=SparseAudit(0.5, form)) for form in ("dense", "rows"))
    (line,) = said("fp32+2:4", dense, dense)
    assert "no faster than fp32 by estimate: all 2 layers" in line
    assert said("fp32+2:4", dense, rows) == said("fp32", dense) == []


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", ["raspberry-pi-4", "raspberry-pi-5", "x86-64-v3", "wasm-simd"])
def test_both_forms_are_counted_for_the_same_products(name: str, groups: int) -> None:
    """Twice the pixels are about twice the instructions of either; more products per instruction
    in integers, as every target here has them, are fewer instructions."""
    target = Target.load(name)

    def counted(rows: int) -> dict[str, int]:
        x = Blocked(1, 64, rows, 32, 64, dtype="uint8")
        limits = Limits(-(2.0**20), 2.0**20)
        most = target.integer.weight_limit or 127
        op = QConvOp(x, replace(x), (1, 1), limits, groups=groups, limit=most)
        found = pace.estimates(op, target)
        assert found is not None
        return found

    small, large = counted(16), counted(32)
    for form in small:
        assert 1.9 < large[form] / small[form] < 2.1
    if groups == 1:
        assert small["integer"] < small["float32"]


def test_packed_inputs_are_widened_once() -> None:
    """In WebAssembly, so that codes take half the instructions of the direct kernel in float32."""
    target = Target.load("wasm-simd")
    x, y = (Blocked(1, 64, h, w, 64, dtype="uint8") for h, w in ((17, 30), (13, 28)))
    limit = target.integer.weight_limit or 127
    op = QConvOp(x, y, (5, 3), Limits(-(2.0**20), 2.0**20), limit=limit)
    found = pace.estimates(op, target)
    assert found is not None and 0.45 < found["integer"] / found["float32"] < 0.57


@pytest.mark.slow
def test_compile_warns_of_zeros_that_do_not_pay(tmp_path: Path) -> None:
    notes: list[Any] = []
    edgepipe.compile("digits", target="x86-64-v3", recipe="fp32+30%", output=tmp_path / "b",
                     notes=notes)  # fmt: skip
    assert [n.text for n in notes if n.stage == pace.STAGE and "no faster than fp32" in n.text]
