"""Pooling of any rank: max with indices, average, Lp, global."""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from edgepipe.lowering.converters.conv import Window, window
from edgepipe.lowering.converters.loops import If, Kernel
from edgepipe.lowering.converters.numeric import compute_dtype, libm, like, lowest
from edgepipe.lowering.converters.op import Expr, Op, cast, const, product
from edgepipe.lowering.converters.reduce import MAX, SUM, fold_axes
from edgepipe.lowering.converters.registry import converts


def _taps(
    index: Any, win: Window, spatial: tuple[int, ...], out: tuple[int, ...], taps: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Source position of every tap and the conditions under which it is inside the input."""
    source, inside = [], []
    for a, n in enumerate(spatial):
        i = index[a] * win.strides[a] + taps[a] * win.dilations[a] - win.begin[a]
        last = (out[a] - 1) * win.strides[a] + (win.kernel[a] - 1) * win.dilations[a]
        inside += [i >= 0] if win.begin[a] > 0 else []
        inside += [i < n] if last - win.begin[a] >= n else []
        source.append(i)
    return source, inside


def pool_te(
    x: Any, win: Window, out: tuple[int, ...], combine: Any, empty: Any, before: Any
) -> Any:
    """TE: ``combine`` of ``before(element)`` over each window; ``empty`` outside the input."""
    spatial = tuple(int(d) for d in x.shape[2:])

    taps = [te.reduce_axis((0, k), f"k{a}") for a, k in enumerate(win.kernel)]

    def element(n: Any, c: Any, *where: Any) -> Any:
        source, inside = _taps(where, win, spatial, out[2:], taps)
        value = before(x(n, c, *source))
        if inside:
            value = tirx.if_then_else(tirx.all(*inside), value, empty)
        return combine(value, axis=taps)

    return te.compute(out, element, name="pool")


@converts("MaxPool")
def _max_pool(op: Op) -> Any:
    spatial, dtype = op.shape()[2:], op.dtype()
    win = window(op, tuple(op.attr("kernel_shape")), spatial)
    if op.wants(1):
        return _max_pool_indices(op, win)
    wide = compute_dtype(dtype)

    def pool(x: Any) -> Any:
        y = pool_te(x, win, op.out_shape(), MAX, lowest(wide), lambda v: cast(v, wide))
        return y if wide == dtype else te.compute(y.shape, lambda *i: cast(y(*i), dtype))

    return op.te(pool, op.tensor(0))


def _max_pool_indices(op: Op, win: Window) -> list[Expr]:
    """Maximum and its flat position in the whole input, first in window order."""
    shape, out = op.shape(), op.out_shape()
    rank = len(shape) - 2
    column_major = bool(op.attr("storage_order", 0))
    strides = [1] * rank
    order = range(1, rank) if column_major else range(rank - 2, -1, -1)
    for a in order:
        b = a - 1 if column_major else a + 1
        strides[a] = strides[b] * shape[2 + b]
    image = product(shape[2:])

    with Kernel(op, "max_pool_indices", outputs=[0, 1]) as k:
        x, y, position = k.input(0), k.output(0), k.output(1)
        best, found = k.local(str(op.dtype())), k.local("int64")
        with k.nest(*out) as (n, c, *where):
            best[0] = lowest(op.dtype())
            found[0] = const(-1, "int64")
            with k.nest(*win.kernel) as taps:
                source, inside = _taps(where, win, shape[2:], out[2:], taps)
                with If(tirx.all(*inside) if inside else None):
                    value = x[(n, c, *source)]
                    with If(tirx.Or(value > best[0], found[0] < const(0, "int64"))):
                        best[0] = value
                        flat = sum((i * s for i, s in zip(source, strides, strict=True)), start=0)
                        found[0] = cast((n * shape[1] + c) * image + flat, "int64")
            y[(n, c, *where)] = best[0]
            position[(n, c, *where)] = found[0]
    return k.results


@converts("AveragePool")
def _average_pool(op: Op) -> Expr:
    spatial, dtype, out = op.shape()[2:], op.dtype(), op.out_shape()
    win = window(op, tuple(op.attr("kernel_shape")), spatial)
    include = bool(op.attr("count_include_pad", 0))
    wide = compute_dtype(dtype)

    def counted(index: Any, a: int) -> Any:
        """Taps of axis ``a`` that count: those over the input, or over input and padding."""
        first = index[a] * win.strides[a]
        low = 0 if include else win.begin[a]
        high = spatial[a] + win.begin[a] + (win.end[a] if include else 0)
        reach = (out[2 + a] - 1) * win.strides[a] + (win.kernel[a] - 1) * win.dilations[a]
        if low == 0 and reach < high:
            return win.kernel[a]
        d = win.dilations[a]
        skipped = tirx.max(0, (low - first + d - 1) // d) if low else 0
        until = tirx.min(win.kernel[a], (high - first + d - 1) // d)
        return until - skipped

    def pool(x: Any) -> Any:
        total = pool_te(x, win, out, SUM, const(0, wide), lambda v: cast(v, wide))

        def mean(*index: Any) -> Any:
            count: Any = 1
            for a in range(len(spatial)):
                count = count * counted(index[2:], a)
            value = total(*index)
            if isinstance(count, int):
                return cast(value * const(1.0 / count, wide), dtype)
            return cast(value / cast(tirx.max(count, 1), wide), dtype)

        return te.compute(out, mean, name="mean")

    return op.te(pool, op.tensor(0))


def _lp_root(total: Any, p: int) -> Any:
    if p == 1:
        return total
    return tirx.sqrt(total) if p == 2 else libm("pow", total, like(1.0 / p, total))


def _lp_power(v: Any, p: int) -> Any:
    magnitude = tirx.abs(v)
    return {1: magnitude, 2: v * v}.get(p) if p in (1, 2) else libm("pow", magnitude, like(p, v))


@converts("LpPool")
def _lp_pool(op: Op) -> Expr:
    win = window(op, tuple(op.attr("kernel_shape")), op.shape()[2:])
    p, dtype = op.attr("p", 2), op.dtype()
    wide = compute_dtype(dtype)

    def pool(x: Any) -> Any:
        total = pool_te(
            x, win, op.out_shape(), SUM, const(0, wide), lambda v: _lp_power(cast(v, wide), p)
        )
        return te.compute(total.shape, lambda *i: cast(_lp_root(total(*i), p), dtype), name="root")

    return op.te(pool, op.tensor(0))


@converts("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def _global_pool(op: Op) -> Expr:
    dtype, axes = op.dtype(), list(range(2, len(op.shape())))
    wide, p = compute_dtype(dtype), op.attr("p", 2)
    count = product(op.shape()[2:])
    combine = MAX if op.type == "GlobalMaxPool" else SUM

    def before(v: Any) -> Any:
        return _lp_power(cast(v, wide), p) if op.type == "GlobalLpPool" else cast(v, wide)

    def finish(v: Any) -> Any:
        if op.type == "GlobalAveragePool":
            return v * const(1.0 / count, wide)
        return _lp_root(v, p) if op.type == "GlobalLpPool" else v

    def pool(x: Any) -> Any:
        total = fold_axes(x, axes, combine, before, "fold")
        return te.compute(total.shape, lambda *i: cast(finish(total(*i)), dtype), name="out")

    return op.te(pool, op.tensor(0))


@converts("MaxUnpool")
def _max_unpool(op: Op) -> Expr:
    """Scatter to flat positions of the unpooled tensor; the rest is zero (ONNX MaxUnpool)."""
    shape, out = op.shape(), op.out_shape()
    inferred = _unpooled(op)
    with Kernel(op, "max_unpool", outputs=[0]) as k:
        x, indices, y = k.input(0), k.input(1), k.output(0)
        with k.each(product(out)) as i:
            y.flat[i] = const(0, op.dtype())
        with k.each(product(shape)) as i:
            flat = indices.flat[i]
            target = _reindexed(flat, inferred, out)
            with If(tirx.all(target >= 0, target < product(out))):
                y.flat[target] = x.flat[i]
    return k.results[0]


def _unpooled(op: Op) -> tuple[int, ...]:
    """The shape the indices refer to: the one without ``output_shape``."""
    shape = op.shape()
    win = window(op, tuple(op.attr("kernel_shape")), shape[2:])
    return (
        *shape[:2],
        *(
            (n - 1) * s - b - e + k
            for n, s, b, e, k in zip(
                shape[2:], win.strides, win.begin, win.end, win.kernel, strict=True
            )
        ),
    )


def _reindexed(flat: Any, own: tuple[int, ...], out: tuple[int, ...]) -> Any:
    """Flat position in ``out`` of the element at flat position ``flat`` of ``own``."""
    if own == out:
        return flat
    index: list[Any] = []
    for extent in reversed(own):
        index.insert(0, flat % extent)
        flat = flat // extent
    position: Any = 0
    for i, extent in zip(index, out, strict=True):
        position = position * extent + i
    return position
