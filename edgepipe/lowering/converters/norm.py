"""Normalisations and softmaxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from edgepipe.lowering.converters import rows
from edgepipe.lowering.converters.loops import If, Kernel
from edgepipe.lowering.converters.numeric import compute_dtype, libm, like, lowest
from edgepipe.lowering.converters.op import (
    Buffer,
    Expr,
    Op,
    at,
    axis_of,
    cast,
    const,
    kind,
    product,
)
from edgepipe.lowering.converters.reduce import MAX, SUM, fold_axes
from edgepipe.lowering.converters.registry import converts


def _wide(x: Any, dtype: str) -> Any:
    """TE stage: ``x`` as ``dtype``."""
    if kind(x) == dtype:
        return x
    return te.compute(x.shape, lambda *i: cast(x(*i), dtype), name="wide")


def _copied(stage: Any, dtype: str) -> Any:
    """TE stage: ``stage`` as ``dtype`` in a buffer of its own."""
    return te.compute(stage.shape, lambda *i: cast(stage(*i), dtype), name="copied")


def moments(x: Any, axes: list[int], count: int) -> tuple[Any, Any]:
    """TE: mean and (biased) variance of ``x`` over ``axes``, kept with extent 1; two passes."""
    dtype = kind(x)
    total = fold_axes(x, axes, SUM, lambda v: v, "total")
    rough = te.compute(total.shape, lambda *i: total(*i) * const(1 / count, dtype), name="rough")
    # And what rounding left (Chan et al. 1983): equal elements are their mean, or √ε shows it.
    off = te.compute(x.shape, lambda *i: x(*i) - at(rough, i), name="off")
    rest = fold_axes(off, axes, SUM, lambda v: v, "rest")
    mean = te.compute(
        total.shape, lambda *i: rough(*i) + rest(*i) * const(1 / count, dtype), name="mean"
    )
    centred = te.compute(x.shape, lambda *i: x(*i) - at(mean, i), name="centred")
    squares = fold_axes(centred, axes, SUM, lambda v: v * v, "squares")
    variance = te.compute(
        total.shape, lambda *i: squares(*i) * const(1 / count, dtype), name="variance"
    )
    return mean, variance


def _affine(value: Any, scale: Any, bias: Any, dtype: str) -> Any:
    if scale is not None:
        value = value * cast(scale, dtype)
    return value if bias is None else value + cast(bias, dtype)


@converts("LayerNormalization")
def _layer_norm(op: Op) -> list[Expr]:
    shape, dtype = op.shape(), op.dtype()
    axis = axis_of(op.attr("axis", -1), len(shape))
    axes, epsilon = list(range(axis, len(shape))), op.attr("epsilon", 1e-5)
    wide, count = compute_dtype(dtype), product(shape[axis:])

    def norm(x: Any, scale: Any, bias: Any) -> list[Any]:
        mean, variance = moments(_wide(x, wide), axes, count)
        inverse = te.compute(
            mean.shape,
            lambda *i: like(1, mean(*i)) / tirx.sqrt(variance(*i) + const(epsilon, wide)),
            name="inverse",
        )

        def element(*i: Any) -> Any:
            value = (cast(x(*i), wide) - at(mean, i)) * at(inverse, i)
            extra = None if bias is None else at(bias, i)
            return cast(_affine(value, at(scale, i), extra, wide), dtype)

        outputs = [te.compute(x.shape, element, name="normalised")]
        for number, stage in ((1, mean), (2, inverse)):
            if op.wants(number):
                outputs.append(_copied(stage, op.out_dtype(number)))
        return outputs

    bias = op.inputs[2] if op.has(2) else None
    result = op.te(norm, op.tensor(0), op.inputs[1], bias)
    wanted = [n for n in range(3) if n == 0 or op.wants(n)]
    if len(wanted) == 1:
        return [op.item(result, 0) if hasattr(result.ty, "fields") else result]
    items = {n: op.item(result, k) for k, n in enumerate(wanted)}
    return [items.get(n) for n in range(3)]


@converts("RMSNormalization")
def _rms_norm(op: Op) -> Expr:
    shape, dtype = op.shape(), op.out_dtype()
    axis = axis_of(op.attr("axis", -1), len(shape))
    wide, count = compute_dtype(op.dtype()), product(shape[axis:])
    axes, epsilon = list(range(axis, len(shape))), op.attr("epsilon", 1e-5)
    if dtype == "float32" and rows.fits(op, axis) and op.shape(1) == shape[axis:]:
        return rows.rms_norm(op, axis, epsilon)

    def norm(x: Any, scale: Any) -> Any:
        squares = fold_axes(x, axes, SUM, lambda v: cast(v, wide) * cast(v, wide), "squares")
        inverse = te.compute(
            squares.shape,
            lambda *i: (
                const(1, wide)
                / tirx.sqrt(squares(*i) * const(1 / count, wide) + const(epsilon, wide))
            ),
            name="inverse",
        )
        return te.compute(
            x.shape,
            lambda *i: cast(cast(x(*i), wide) * at(inverse, i) * cast(at(scale, i), wide), dtype),
            name="normalised",
        )

    return op.te(norm, op.tensor(0), op.inputs[1])


@converts("InstanceNormalization", "GroupNormalization")
def _group_norm(op: Op) -> Expr:
    shape, dtype = op.shape(), op.dtype()
    wide, epsilon = compute_dtype(dtype), op.attr("epsilon", 1e-5)
    groups = op.attr("num_groups") if op.type == "GroupNormalization" else shape[1]
    each = shape[1] // groups
    count = product(shape[2:]) * each
    rest = product(shape[2:])

    def norm(x: Any, scale: Any, bias: Any) -> Any:
        wide_x = _wide(x, wide)
        mean, variance = moments(wide_x, [2, 3], count)

        def element(*i: Any) -> Any:
            n, g, c, s = i
            inverse = const(1, wide) / tirx.sqrt(variance(n, g, 0, 0) + const(epsilon, wide))
            value = (wide_x(n, g, c, s) - mean(n, g, 0, 0)) * inverse
            channel = [g * each + c]
            return cast(_affine(value, at(scale, channel), at(bias, channel), wide), dtype)

        return te.compute(x.shape, element, name="normalised")

    folded = op.reshape(op.inputs[0], (shape[0], groups, each, rest))
    return op.reshape(op.te(norm, Buffer(folded), op.inputs[1], op.inputs[2]), shape)


@converts("BatchNormalization")
def _batch_norm(op: Op) -> Expr:
    if op.attr("training_mode", 0):
        raise op.unsupported("training_mode=1", "export the model in inference mode")
    dtype, epsilon = op.dtype(), op.attr("epsilon", 1e-5)
    wide = compute_dtype(dtype)

    def element(i: Any, x: Any, *parameters: Any) -> Any:
        scale, bias, mean, variance = (
            cast(at(p, [i[1] if len(i) > 1 else 0]), wide) for p in parameters
        )
        factor = scale / tirx.sqrt(variance + const(epsilon, wide))
        return cast((cast(x(*i), wide) - mean) * factor + bias, dtype)

    return op.compute(op.out_shape(), element, op.tensor(0), *op.inputs[1:5])


@converts("Softmax", "LogSoftmax")
def _softmax(op: Op) -> Expr:
    shape, dtype = op.shape(), op.dtype()
    axis = axis_of(op.attr("axis", -1), len(shape))
    wide, logarithmic = compute_dtype(dtype), op.type == "LogSoftmax"
    if logarithmic and axis == len(shape) - 1 and rows.fits(op, axis):
        return rows.log_softmax(op)

    def softmax(x: Any) -> Any:
        top = fold_axes(x, [axis], MAX, lambda v: cast(v, wide), "top")

        def shifted(*i: Any) -> Any:
            return cast(x(*i), wide) - at(top, i)

        power = te.compute(x.shape, lambda *i: tirx.exp(shifted(*i)), name="power")
        total = fold_axes(power, [axis], SUM, lambda v: v, "total")
        finish: Callable[..., Any]
        if logarithmic:
            log = te.compute(total.shape, lambda *i: libm("log", total(*i)), name="log")

            def finish(*i: Any) -> Any:
                return cast(shifted(*i) - at(log, i), dtype)
        else:
            inverse = te.compute(total.shape, lambda *i: const(1, wide) / total(*i), name="inverse")

            def finish(*i: Any) -> Any:
                return cast(power(*i) * at(inverse, i), dtype)

        return te.compute(x.shape, finish, name="softmax")

    return op.te(softmax, op.tensor(0))


@converts("Hardmax")
def _hardmax(op: Op) -> Expr:
    shape, dtype = op.shape(), op.dtype()
    axis = axis_of(op.attr("axis", -1), len(shape))
    outer, extent, inner = product(shape[:axis]), shape[axis], product(shape[axis + 1 :])
    with Kernel(op, "hardmax", outputs=[0]) as k:
        x, y = k.input(0), k.output(0)
        best, found = k.local(dtype), k.local("int32")
        with k.nest(outer, inner) as (o, i):
            best[0] = lowest(dtype)
            found[0] = const(0, "int32")
            with k.each(extent) as j:
                value = x.flat[(o * extent + j) * inner + i]
                with If(value > best[0]):
                    best[0] = value
                    found[0] = cast(j, "int32")
            with k.each(extent) as j:
                y.flat[(o * extent + j) * inner + i] = tirx.Select(
                    found[0] == j, const(1, dtype), const(0, dtype)
                )
    return k.results[0]


@converts("LpNormalization")
def _lp_norm(op: Op) -> Expr:
    dtype = op.dtype()
    axis, p = axis_of(op.attr("axis", -1), len(op.shape())), op.attr("p", 2)
    wide = compute_dtype(dtype)

    def norm(x: Any) -> Any:
        total = fold_axes(
            x,
            [axis],
            SUM,
            lambda v: tirx.abs(cast(v, wide)) if p == 1 else cast(v, wide) * cast(v, wide),
            "total",
        )

        def element(*i: Any) -> Any:
            length = at(total, i) if p == 1 else tirx.sqrt(at(total, i))
            # A zero vector stays zero (ONNX LpNormalization).
            divisor = tirx.Select(length == like(0, length), like(1, length), length)
            return cast(cast(x(*i), wide) / divisor, dtype)

        return te.compute(x.shape, element, name="normalised")

    return op.te(norm, op.tensor(0))


@converts("MeanVarianceNormalization")
def _mean_variance(op: Op) -> Expr:
    shape, dtype = op.shape(), op.dtype()
    axes = [axis_of(a, len(shape)) for a in op.attr("axes", (0, 2, 3))]
    wide, count = compute_dtype(dtype), product([shape[a] for a in axes])

    def norm(x: Any) -> Any:
        wide_x = _wide(x, wide)
        mean, variance = moments(wide_x, axes, count)

        def element(*i: Any) -> Any:
            deviation = tirx.sqrt(at(variance, i)) + const(1e-9, wide)
            return cast((wide_x(*i) - at(mean, i)) / deviation, dtype)

        return te.compute(x.shape, element, name="normalised")

    return op.te(norm, op.tensor(0))


@converts("LRN")
def _lrn(op: Op) -> Expr:
    shape, dtype = op.shape(), op.dtype()
    size, wide = op.attr("size"), compute_dtype(dtype)
    alpha, beta, bias = op.attr("alpha", 1e-4), op.attr("beta", 0.75), op.attr("bias", 1.0)
    before = (size - 1) // 2

    def norm(x: Any) -> Any:
        j = te.reduce_axis((0, size), "j")

        def square(n: Any, c: Any, *rest: Any) -> Any:
            channel = c + j - before
            v = cast(x(n, channel, *rest), wide)
            inside = tirx.all(channel >= 0, channel < shape[1])
            return te.sum(tirx.if_then_else(inside, v * v, const(0, wide)), axis=j)

        squares = te.compute(x.shape, square, name="squares")

        def element(*i: Any) -> Any:
            scale = const(bias, wide) + const(alpha / size, wide) * squares(*i)
            return cast(cast(x(*i), wide) / libm("pow", scale, const(beta, wide)), dtype)

        return te.compute(x.shape, element, name="normalised")

    return op.te(norm, op.tensor(0))
