"""Sparse kernels against float64, over odd shapes, kernels, strides, borders and patterns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepipe.kernels import sparse, sparse_cost, sparse_shared
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import NO_PADS, Blocked, Pads
from edgepipe.kernels.ops import ConvOp, MatmulOp, RelayoutOp
from edgepipe.sparsity.pattern import Pattern
from edgepipe.sparsity.pruning import mask
from edgepipe.target import Target
from tests.kernels import reference
from tests.kernels.harness import FLOOR_DB, Kernels, snr_db, target_with

CONVOLUTIONS = {"sparse_shared", "sparse_rows", "depthwise_planes"}
TEMPLATES = CONVOLUTIONS | {"sparse_gemv"}

BORDER: Pads = (1, 1, 1, 1)


def weights(
    rng: np.random.Generator, shape: tuple[int, int, int, int], shared: int, density: float
) -> np.ndarray:
    """Weights with patterns shared by ``shared`` output channels."""
    co, ci, kh, kw = shape
    kept = rng.random((-(-co // shared), ci, kh, kw)) < density
    dense = rng.standard_normal(shape, dtype=np.float32)
    return dense * np.repeat(kept, shared, 0)[:co]


def convolution(
    weight: np.ndarray, size: tuple[int, int], lanes: tuple[int, int], form: str | None,
    *, width: int = 1, stride: int = 1, border: Pads = NO_PADS, groups: int = 1, add: bool = False,
    added: Pads = NO_PADS,
) -> ConvOp:  # fmt: skip
    """With "same" padding, held by the input's border, and a spare column where it strides."""
    co, ci, kh, kw = weight.shape
    p, (h, w) = kh // 2, size
    height, across = ((d + 2 * p - kh) // stride + 1 for d in size)
    x = Blocked(1, ci * groups, h, w, lanes[0], (p, p, p, p + stride - 1) if p else NO_PADS)
    y = Blocked(1, co, height, across, lanes[1], border)
    described = {
        "shared": lambda: sparse.shared(weight, width),
        "rows": lambda: sparse.rows(weight),
    }
    return ConvOp(
        x, y, (kh, kw), (stride, stride), (1, 1), (p, p), groups,
        (Step("add"), Step("relu")) if add else (Step("relu"),),
        (replace(y, pads=added),) if add else (),
        sparse=described[form]() if form else None,
    )  # fmt: skip


def cases(rng: np.random.Generator, lanes: int) -> list[tuple[np.ndarray, ConvOp]]:
    def one(shape, size, form, density=0.3, **more):  # type: ignore[no-untyped-def]
        weight = weights(rng, shape, more.get("width", 1), density)
        read = 1 if form == "rows" or more.get("groups", 1) > 1 or shape[1] < 4 else lanes
        written = 1 if form == "rows" or more.get("groups", 1) > 1 else lanes
        return weight, convolution(weight, size, (read, written), form, **more)

    two = 2 * lanes
    return [
        one((4 * lanes, 20, 1, 1), (9, 11), "shared", width=two),
        one((two - 2, 20, 1, 1), (9, 11), "shared", width=two, border=BORDER, add=True),
        one((two, 33, 3, 3), (9, 11), "shared", width=lanes, border=BORDER),
        one((two, 3, 3, 3), (12, 11), "shared", width=two, stride=2),
        one((two, 8, 5, 5), (7, 5), "shared", width=lanes, stride=2, add=True),
        one((two, 4, 1, 1), (3, 3), "shared", width=two, density=0.0),
        one((22, 20, 1, 1), (9, 11), "rows", add=True),
        one((22, 600, 1, 1), (7, 7), "rows", density=0.002, border=BORDER),
        one((6, 20, 1, 1), (14, 14), "rows", border=BORDER, add=True),
        one((6, 20, 1, 1), (6, 5), "rows", border=(0, 2, 1, 0)),
        one((6, 20, 1, 1), (6, 5), "rows", add=True, added=BORDER),
        one((22, 20, 3, 3), (14, 14), "rows", border=(0, 1, 1, 0)),
        one((5, 20, 1, 1), (2, 2), "rows"),
        one((5, 1, 3, 3), (9, 11), None, density=1, groups=5, border=BORDER, add=True),
        one((6, 1, 3, 3), (14, 14), None, density=1, groups=6, stride=2, border=BORDER),
        one((6, 1, 5, 5), (15, 13), None, density=1, groups=6, stride=2),
        one((2, 1, 3, 3), (3, 3), None, density=1, groups=2, stride=2),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("lanes", "registers"), [(4, 16), (4, 32), (8, 16), (16, 32)])
def test_against_float64(lanes: int, registers: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    every = cases(rng, lanes)
    kernels = Kernels([op for _, op in every], target_with(lanes, registers), tmp_path)
    names = {template.name for template in kernels.templates}
    assert names == CONVOLUTIONS
    for index, (weight, op) in enumerate(every):
        x = rng.standard_normal((1, op.x.c, op.x.h, op.x.w), dtype=np.float32)
        bias = rng.standard_normal(op.y.c, dtype=np.float32)
        operands = [rng.standard_normal((1, r.c, r.h, r.w), dtype=np.float32) for r in op.residuals]
        plain = reference.conv(x, weight, bias, op)
        expected = reference.apply(op.epilogue, plain, operands)
        packed = [r.pack(o) for r, o in zip(op.residuals, operands, strict=True)]
        out = kernels.run(index, [op.x.pack(x)], [weight, bias], packed, op.y.elements)
        assert snr_db(expected, op.y.unpack(out)) > FLOOR_DB, op
        assert np.isfinite(out).all(), op
        # Positive control: two channels of the weights swapped.
        if weight.any():
            other = reference.apply(
                op.epilogue, reference.conv(x, weight[::-1], bias, op), operands
            )
            assert snr_db(other, op.y.unpack(out)) < 40, op


def one_row(
    a: np.ndarray, weight: np.ndarray, op: MatmulOp, bias: np.ndarray, operands: list[np.ndarray]
) -> np.ndarray:
    """``op`` in float64."""
    plain = a.astype(np.float64) @ weight.astype(np.float64) + (bias if op.bias else 0)
    return reference.apply(op.epilogue, plain, [o[None] for o in operands])


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.002, 0.3, 1.0])
def test_dense_layers_of_one_row_against_float64(density: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    sizes: list[tuple[int, int, bool, tuple[str, ...]]] = [
        (9, 7, True, ()),
        (256, 33, False, ("row",)),
        (257, 5, True, ("full", "row")),
        (70000, 30, True, ()),
    ]
    every = []
    for k, n, bias, kinds in sizes:
        share = min(density, 3000 / k)  # more terms than that are not within FLOOR_DB
        weight = weights(rng, (k, n, 1, 1), 1, share)[:, :, 0, 0]
        weight[:, 1] = 0
        steps = (*(Step("add") for _ in kinds), Step("relu"))
        op = MatmulOp(1, 1, k, n, True, bias, epilogue=steps, residuals=kinds)
        every.append((weight, replace(op, sparse=sparse.gathered(weight.T))))
    kernels = Kernels([op for _, op in every], Target.load("host"), tmp_path)
    for index, (weight, op) in enumerate(every):
        assert kernels.templates[index].name == "sparse_gemv"
        a = rng.standard_normal((1, op.k), dtype=np.float32)
        bias = rng.standard_normal(op.n, dtype=np.float32)
        operands = [rng.standard_normal(op.n, dtype=np.float32) for _ in op.residuals]
        out = kernels.run(index, [a], [weight, *([bias] if op.bias else [])], operands, op.n)
        assert snr_db(one_row(a, weight, op, bias, operands), out[None]) > FLOOR_DB, op
        if np.count_nonzero(weight) > op.n:  # positive control: the inputs in another order
            assert snr_db(one_row(a, weight[::-1], op, bias, operands), out[None]) < 40, op


def test_gathered_places_fill_groups() -> None:
    matrix = weights(np.random.default_rng(5), (6, 90, 1, 1), 1, 0.2)[:, :, 0, 0]
    matrix[2] = 0
    places, starts, stored = sparse.pack_gathered(matrix)
    found = np.zeros_like(matrix)
    for row in range(6):
        part = slice(starts[row] * sparse.GATHERED, starts[row + 1] * sparse.GATHERED)
        np.add.at(found[row], places[part], stored[part])
    assert np.array_equal(found, matrix)
    assert len(places) == sparse.gathered(matrix).places


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [4, 16])
def test_copies_between_planes_and_blocks(lanes: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [(12, 5, 7), (17, 6, 20), (33, 17, 17), (3, 9, 18)]
    layouts = [
        (Blocked(2, c, h, w, a, before), Blocked(2, c, h, w, b, after))
        for c, h, w in sizes
        for a, b in ((1, lanes), (lanes, 1))
        for before, after in ((NO_PADS, NO_PADS), ((1, 0, 1, 2), BORDER))
    ]
    kernels = Kernels([RelayoutOp(x, y) for x, y in layouts], target_with(lanes, 32), tmp_path)
    for index, (x, y) in enumerate(layouts):
        array = rng.standard_normal((2, x.c, x.h, x.w), dtype=np.float32)
        out = kernels.run(index, [x.pack(array)], [], [], y.elements)
        assert np.array_equal(y.unpack(out), array), (x, y)
        assert np.isfinite(out).all()


@pytest.mark.parametrize("density", [0.001, 0.2, 1.0])
def test_rows_pack_every_weight_once(density: float) -> None:
    weight = weights(np.random.default_rng(2), (7, 900, 1, 1), 1, density)
    distances, starts, stored = sparse.pack_rows(weight)
    assert distances.dtype == np.uint8
    found = np.zeros((7, 900), np.float32)
    for row in range(7):
        part = slice(starts[row], starts[row + 1])
        places = np.cumsum(distances[part].astype(int))
        assert (np.diff(places) > 0).all()
        found[row, places] = stored[part]
    assert np.array_equal(found, weight[:, :, 0, 0])
    assert sparse.rows(weight).nonzeros == np.count_nonzero(weight)


def test_estimates_take_the_form_that_was_measured_to_be_faster() -> None:
    """On AVX2, 256 channels at 28x28: scattered 2:4 loses to dense, shared by 32 it wins with tiles
    of 32, and at 80 % rows win."""
    target = Target.load("x86-64-v3")
    rng = np.random.default_rng(0)

    def best(kept: np.ndarray) -> str:
        weight = rng.standard_normal((256, 256, 1, 1), dtype=np.float32) * kept[..., None, None]
        op = convolution(weight, (28, 28), (8, 8), None)
        shared = [sparse.shared(weight, width) for width in sparse_shared.widths(target, 256)]
        costs = {f"shared {f.width}": sparse_cost.shared(op, f, target) for f in shared}
        costs["rows"] = sparse_cost.rows(op, sparse.rows(weight), target)
        costs["dense"] = sparse_cost.dense(op, target)
        return min(costs, key=lambda form: costs[form])

    scores = rng.random((256, 256, 1))
    masks = {
        text: mask(scores, Pattern.parse(text, ""))[..., 0] for text in ("2:4", "2:4v32", "80%")
    }
    found = {text: best(kept) for text, kept in masks.items()}
    assert found == {"2:4": "dense", "2:4v32": "shared 32", "80%": "rows"}
