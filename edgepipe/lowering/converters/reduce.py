"""Reductions over axes, ArgMax and ArgMin, cumulative sums, TopK."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from edgepipe.lowering.converters.numeric import (
    compute_dtype,
    convert,
    highest,
    is_float,
    libm,
    like,
    lowest,
)
from edgepipe.lowering.converters.op import Expr, Op, axis_of, cast, const, kind, product
from edgepipe.lowering.converters.registry import converts


def _larger(a: Any, b: Any) -> Any:
    return tirx.max(a, b)


def _smaller(a: Any, b: Any) -> Any:
    return tirx.min(a, b)


SUM = te.sum
#: te.max and te.min start from the largest finite number, which is wrong for infinite elements.
MAX = te.comm_reducer(_larger, lambda t: lowest(str(t)), name="max")
MIN = te.comm_reducer(_smaller, lambda t: highest(str(t)), name="min")
PRODUCT = te.comm_reducer(lambda a, b: a * b, lambda t: const(1, str(t)), name="product")


@dataclass(frozen=True)
class _Reduction:
    """finish(combine over before(x), number of elements reduced)."""

    combine: Any
    empty: float
    before: Callable[[Any], Any] = lambda x: x
    finish: Callable[[Any, int], Any] | None = None

    def end(self, total: Any, count: int) -> Any:
        """The result for a combined value over ``count`` elements."""
        return total if self.finish is None else self.finish(total, count)


_REDUCTIONS = {
    "ReduceSum": _Reduction(SUM, 0),
    "ReduceMean": _Reduction(SUM, np.nan, finish=lambda x, n: x / like(n, x)),
    "ReduceProd": _Reduction(PRODUCT, 1),
    "ReduceMax": _Reduction(MAX, -np.inf),
    "ReduceMin": _Reduction(MIN, np.inf),
    "ReduceL1": _Reduction(SUM, 0, before=lambda x: tirx.Select(x < like(0, x), like(0, x) - x, x)),
    "ReduceL2": _Reduction(SUM, 0, lambda x: x * x, lambda x, n: _root(x)),
    "ReduceSumSquare": _Reduction(SUM, 0, lambda x: x * x),
    "ReduceLogSum": _Reduction(SUM, -np.inf, finish=lambda x, n: libm("log", x)),
}


def _root(x: Any) -> Any:
    dtype = kind(x)
    return tirx.sqrt(x) if is_float(dtype) else cast(tirx.sqrt(cast(x, "float64")), dtype)


def reduced_axes(op: Op) -> list[int] | None:
    """Axes a Reduce operator works on; None when it is the identity."""
    rank = len(op.shape())
    axes = op.static(1, "axes").tolist() if op.has(1) else list(op.attr("axes", ()))
    if not axes:
        return None if op.attr("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({axis_of(int(a), rank) for a in axes})


def fold_axes(
    x: Any, axes: list[int], combine: Any, before: Callable[[Any], Any], name: str
) -> Any:
    """TE stage: ``combine`` of ``before(element)`` over ``axes``, which stay with extent 1."""
    shape = [int(d) for d in x.shape]
    ranges = {a: te.reduce_axis((0, shape[a]), f"r{a}") for a in axes}
    kept = tuple(1 if a in axes else d for a, d in enumerate(shape))

    def element(*index: Any) -> Any:
        where = [ranges.get(a, i) for a, i in enumerate(index)]
        return combine(before(x(*where)), axis=list(ranges.values()))

    return te.compute(kept, element, name=name)


def _reduce(op: Op) -> Expr:
    rule, axes, dtype = _REDUCTIONS[op.type], reduced_axes(op), op.dtype()
    if 0 in op.shape():
        return _empty(op, rule.empty)
    wide = "int8" if dtype == "bool" else compute_dtype(dtype)
    if axes is None or not axes:
        return op.compute(
            op.out_shape(),
            lambda i, x: convert(rule.end(rule.before(convert(x(*i), wide)), 1), dtype),
            op.tensor(0),
        )
    kept = tuple(1 if a in axes else d for a, d in enumerate(op.shape()))
    count = product([op.shape()[a] for a in axes])

    def reduction(x: Any) -> Any:
        total = fold_axes(x, axes, rule.combine, lambda v: rule.before(convert(v, wide)), "fold")
        if rule.finish is None and wide == dtype:
            return total
        return te.compute(kept, lambda *i: convert(rule.end(total(*i), count), dtype), name="out")

    return op.reshape(op.te(reduction, op.tensor(0)), op.out_shape())


def _empty(op: Op, value: float) -> Expr:
    dtype = op.out_dtype()
    if dtype == "bool":
        return op.const(np.full(op.out_shape(), value > 0))
    if not is_float(dtype) and np.isinf(value):
        value = np.iinfo(dtype).max if value > 0 else np.iinfo(dtype).min
    return op.const(np.full(op.out_shape(), value, dtype))


for _name in _REDUCTIONS:
    converts(_name)(_reduce)


@converts("ReduceLogSumExp")
def _log_sum_exp(op: Op) -> Expr:
    axes, dtype = reduced_axes(op), op.dtype()
    if not dtype.startswith("float"):
        raise op.unsupported(f"{dtype}, whose logarithms are no integers", "cast to float32")
    if 0 in op.shape():
        return _empty(op, -np.inf)
    if axes is None:
        return op.inputs[0]
    wide = compute_dtype(dtype)
    kept = tuple(1 if a in axes else d for a, d in enumerate(op.shape()))

    def reduction(x: Any) -> Any:
        top = fold_axes(x, axes, MAX, lambda v: cast(v, wide), "top") if axes else x
        # An infinite maximum would make inf - inf.
        finite = te.compute(
            kept,
            lambda *i: tirx.Select(
                tirx.abs(top(*i)) == const(np.inf, wide), const(0, wide), top(*i)
            ),
            name="finite",
        )
        shifted = te.compute(
            x.shape,
            lambda *i: tirx.exp(
                cast(x(*i), wide) - finite(*[0 if kept[a] == 1 else j for a, j in enumerate(i)])
            ),
            name="shifted",
        )
        total = fold_axes(shifted, axes, SUM, lambda v: v, "total") if axes else shifted
        return te.compute(
            kept, lambda *i: cast(libm("log", total(*i)) + finite(*i), dtype), name="out"
        )

    return op.reshape(op.te(reduction, op.tensor(0)), op.out_shape())
