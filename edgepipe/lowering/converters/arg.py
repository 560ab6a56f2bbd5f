"""ArgMax, ArgMin, and running sums and products."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from edgepipe.lowering.converters.loops import If, Kernel
from edgepipe.lowering.converters.numeric import compute_dtype
from edgepipe.lowering.converters.op import Expr, Op, axis_of, cast, const, product
from edgepipe.lowering.converters.registry import converts


@converts("ArgMax", "ArgMin")
def _arg_extreme(op: Op) -> Expr:
    shape, dtype = op.shape(), op.dtype()
    axis = axis_of(op.attr("axis", 0), len(shape))
    outer, extent, inner = product(shape[:axis]), shape[axis], product(shape[axis + 1 :])
    last, largest = bool(op.attr("select_last_index", 0)), op.type == "ArgMax"
    wide = compute_dtype(dtype)
    with Kernel(op, op.type.lower(), outputs=[0]) as k:
        x, y = k.input(0), k.output(0)
        best, found = k.local(wide), k.local("int64")
        with k.nest(outer, inner) as (o, i):

            def value(j: Any, o: Any = o, i: Any = i) -> Any:
                return cast(x.flat[(o * extent + j) * inner + i], wide)

            best[0] = value(0)
            found[0] = const(0, "int64")
            with k.each(extent) as j:
                v = value(j)
                better = (
                    (v >= best[0] if last else v > best[0])
                    if largest
                    else (v <= best[0] if last else v < best[0])
                )
                with If(better):
                    best[0] = v
                    found[0] = cast(j, "int64")
            y.flat[o * inner + i] = found[0]
    return k.results[0]


@converts("CumSum", "CumProd")
def _cumulate(op: Op) -> Expr:
    shape, dtype = op.shape(), op.dtype()
    axis = axis_of(int(op.static(1, "axis").reshape(())), len(shape))
    outer, extent, inner = product(shape[:axis]), shape[axis], product(shape[axis + 1 :])
    exclusive, reverse = bool(op.attr("exclusive", 0)), bool(op.attr("reverse", 0))
    multiply = op.type == "CumProd"
    wide = compute_dtype(dtype)
    with Kernel(op, op.type.lower(), outputs=[0], inputs=op.inputs[:1]) as k:
        x, y = k.input(0), k.output(0)
        total = k.local(wide)
        with k.nest(outer, inner) as (o, i):
            total[0] = const(1 if multiply else 0, wide)
            with k.each(extent) as step:
                j = extent - 1 - step if reverse else step
                position = (o * extent + j) * inner + i
                value = cast(x.flat[position], wide)
                if exclusive:
                    y.flat[position] = cast(total[0], dtype)
                total[0] = total[0] * value if multiply else total[0] + value
                if not exclusive:
                    y.flat[position] = cast(total[0], dtype)
    return k.results[0]


@converts("Det")
def _det(op: Op) -> Expr:
    """Gaussian elimination with partial pivoting, per matrix."""
    n, dtype = op.shape()[-1], op.dtype()
    wide = compute_dtype(dtype)
    with Kernel(op, "det", outputs=[0]) as k:
        x, y = k.input(0), k.output(0)
        m = k.scratch((n, n), wide)
        det, pivot, factor, held = k.local(wide), k.local("int32"), k.local(wide), k.local(wide)
        with k.each(product(op.shape()[:-2])) as b:
            with k.nest(n, n) as (r, c):
                m[r, c] = cast(x.flat[(b * n + r) * n + c], wide)
            det[0] = const(1, wide)
            with k.each(n) as p:
                pivot[0] = cast(p, "int32")
                with (
                    k.each(n) as r,
                    If(tirx.And(r > p, tirx.abs(m[r, p]) > tirx.abs(m[pivot[0], p]))),
                ):
                    pivot[0] = cast(r, "int32")
                with If(pivot[0] != p):
                    det[0] = const(0, wide) - det[0]
                    with k.each(n) as c:
                        held[0] = m[p, c]
                        m[p, c] = m[pivot[0], c]
                        m[pivot[0], c] = held[0]
                det[0] = det[0] * m[p, p]
                with If(m[p, p] != const(0, wide)), k.each(n) as r, If(r > p):
                    factor[0] = m[r, p] / m[p, p]
                    with k.each(n) as c:
                        m[r, c] = m[r, c] - factor[0] * m[p, c]
            y.flat[b] = cast(det[0], dtype)
    return k.results[0]
