"""Matrix products: MatMul, Gemm, Einsum, and their integer forms."""

from __future__ import annotations

from typing import Any

from tvm import te

from edgepipe.lowering.converters.numeric import compute_dtype
from edgepipe.lowering.converters.op import Expr, Op, at, cast, const, kind
from edgepipe.lowering.converters.registry import converts


def matmul_te(a: Any, b: Any, dtype: str) -> Any:
    """``numpy.matmul(a, b)`` as TE, accumulated in ``dtype``. Rank-1 operands are allowed."""
    rank_a, rank_b = len(a.shape), len(b.shape)
    k_extent = int(a.shape[-1])
    batch = _batch(a.shape[:-2], b.shape[:-2])
    rows = [int(a.shape[-2])] if rank_a > 1 else []
    columns = [int(b.shape[-1])] if rank_b > 1 else []
    k = te.reduce_axis((0, k_extent), "k")

    def element(*index: Any) -> Any:
        lead = list(index[: len(batch)])
        rest = list(index[len(batch) :])
        row = [rest.pop(0)] if rows else []
        left = cast(at(a, [*lead, *row, k] if rank_a > 1 else [k]), dtype)
        right = cast(at(b, [*lead, k, *rest] if rank_b > 1 else [k]), dtype)
        return te.sum(left * right, axis=k)

    return te.compute((*batch, *rows, *columns), element, name="matmul")


def _batch(a: Any, b: Any) -> list[int]:
    a, b = [int(d) for d in a], [int(d) for d in b]
    rank = max(len(a), len(b))
    a, b = [1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b
    return [y if x == 1 else x for x, y in zip(a, b, strict=True)]


def narrow(t: Any, dtype: str) -> Any:
    """The TE tensor ``t`` as ``dtype``."""
    if kind(t) == dtype:
        return t
    return te.compute(t.shape, lambda *i: cast(t(*i), dtype), name="narrow")


@converts("MatMul")
def _matmul(op: Op) -> Expr:
    dtype = op.out_dtype()
    a, b = (op.tensor(i) for i in (0, 1))
    return op.te(lambda x, y: narrow(matmul_te(x, y, compute_dtype(dtype)), dtype), a, b)


@converts("Gemm")
def _gemm(op: Op) -> Expr:
    alpha, beta = op.attr("alpha", 1.0), op.attr("beta", 1.0)
    trans_a, trans_b = op.attr("transA", 0), op.attr("transB", 0)
    dtype = op.out_dtype()
    wide = compute_dtype(dtype)
    m, n = op.out_shape()
    k_extent = op.shape(0)[0 if trans_a else 1]

    def gemm(a: Any, b: Any, c: Any) -> Any:
        k = te.reduce_axis((0, k_extent), "k")

        def element(i: Any, j: Any) -> Any:
            left = a(k, i) if trans_a else a(i, k)
            right = b(j, k) if trans_b else b(k, j)
            return te.sum(cast(left, wide) * cast(right, wide), axis=k)

        product = te.compute((m, n), element, name="gemm")

        def finish(i: Any, j: Any) -> Any:
            value = product(i, j)
            if alpha != 1.0:
                value = _scaled(value, alpha, wide)
            if c is not None and beta != 0.0:
                extra = cast(at(c, (i, j)), wide)
                value = value + (extra if beta == 1.0 else _scaled(extra, beta, wide))
            return cast(value, dtype)

        return te.compute((m, n), finish, name="epilogue")

    return op.te(gemm, op.tensor(0), op.tensor(1), op.inputs[2] if op.has(2) else None)


def _scaled(value: Any, factor: float, dtype: str) -> Any:
    if dtype.startswith("float"):
        return value * const(factor, dtype)
    return cast(cast(value, "float64") * const(factor, "float64"), dtype)


@converts("Einsum")
def _einsum(op: Op) -> Expr:
    operands, output = _parse(op)
    extents: dict[str, int] = {}
    for i, labels in enumerate(operands):
        for label, extent in zip(labels, op.shape(i), strict=True):
            extents[label] = max(extents.get(label, 1), extent)
    summed = sorted({x for labels in operands for x in labels} - set(output))
    dtype = op.out_dtype()
    wide = compute_dtype(dtype)

    def einsum(*tensors: Any) -> Any:
        axes = {x: te.reduce_axis((0, extents[x]), f"r{n}") for n, x in enumerate(summed)}

        def element(*index: Any) -> Any:
            where = {**dict(zip(output, index, strict=True)), **axes}
            value: Any = None
            for labels, tensor in zip(operands, tensors, strict=True):
                factor = cast(at(tensor, [where[x] for x in labels]), wide)
                value = factor if value is None else value * factor
            return te.sum(value, axis=list(axes.values())) if axes else value

        product = te.compute(tuple(extents[x] for x in output), element, name="einsum")
        return narrow(product, dtype)

    return op.te(einsum, *[op.tensor(i) for i in range(len(op.inputs))])


def _parse(op: Op) -> tuple[list[list[str]], list[str]]:
    """Labels of each operand and of the result; ellipsis dimensions get labels '0', '1', …"""
    equation = str(op.attr("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    spare = max(
        [len(op.shape(i)) - len(t.replace("...", "")) for i, t in enumerate(terms) if "..." in t]
        or [0]
    )

    def labels(term: str, count: int) -> list[str]:
        head, dots, tail = term.partition("...")
        middle = [str(d) for d in range(spare - count, spare)] if dots else []
        return [*head, *middle, *tail]

    operands = [
        labels(t, len(op.shape(i)) - len(t.replace("...", ""))) for i, t in enumerate(terms)
    ]
    if arrow:
        return operands, labels(right, spare)
    every = [x for term in operands for x in term]
    once = sorted(x for x in set(every) if every.count(x) == 1 and not x.isdigit())
    return operands, [*(str(d) for d in range(spare)), *once]
