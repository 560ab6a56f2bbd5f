"""Convolutions of any rank, plain and transposed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from edgepipe.lowering.converters.numeric import compute_dtype
from edgepipe.lowering.converters.op import Expr, Op, at, cast, const, kind, shape_of
from edgepipe.lowering.converters.registry import converts


@dataclass(frozen=True)
class Window:
    """A sliding window: one entry per spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]


def window(op: Op, kernel: tuple[int, ...], spatial: tuple[int, ...]) -> Window:
    """Attributes of a convolution or pool over ``spatial``, auto_pad resolved."""
    rank = len(spatial)
    strides = tuple(op.attr("strides", (1,) * rank))
    dilations = tuple(op.attr("dilations", (1,) * rank))
    mode = op.attr("auto_pad", "NOTSET")
    pads = tuple(op.attr("pads", (0,) * 2 * rank))
    if mode == "VALID":
        pads = (0,) * 2 * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [
            max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, s, k, d in zip(spatial, strides, kernel, dilations, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = (*small, *large) if mode == "SAME_UPPER" else (*large, *small)
    return Window(kernel, strides, dilations, pads[:rank], pads[rank:])


def padded(x: Any, begin: tuple[int, ...], end: tuple[int, ...], fill: Any) -> Any:
    """TE stage: the last len(begin) axes of ``x`` extended by ``begin`` and ``end``."""
    if not any(begin) and not any(end):
        return x
    rank = len(begin)
    shape = [int(d) for d in x.shape]
    lead = len(shape) - rank
    spatial = shape[lead:]
    out = [*shape[:lead], *[b + n + e for b, n, e in zip(begin, spatial, end, strict=True)]]

    def element(*index: Any) -> Any:
        source, inside = list(index), []
        for a in range(rank):
            source[lead + a] = index[lead + a] - begin[a]
            inside += [source[lead + a] >= 0] if begin[a] > 0 else []
            inside += [source[lead + a] < spatial[a]] if end[a] > 0 else []
        return tirx.if_then_else(tirx.all(*inside), x(*source), fill) if inside else x(*source)

    return te.compute(tuple(out), element, name="padded")


def conv_te(x: Any, w: Any, win: Window, group: int, dtype: str) -> Any:
    """TE: x[n, c, …] ∗ w[oc, c/group, …] accumulated in ``dtype``."""
    rank = len(win.kernel)
    channels, outputs = int(w.shape[1]), int(w.shape[0])
    each = outputs // group
    big = padded(x, win.begin, win.end, const(0, kind(x)))
    spatial = [
        (int(n) - (k - 1) * d - 1) // s + 1
        for n, k, d, s in zip(big.shape[2:], win.kernel, win.dilations, win.strides, strict=True)
    ]
    c = te.reduce_axis((0, channels), "c")
    taps = [te.reduce_axis((0, win.kernel[a]), f"k{a}") for a in range(rank)]

    def element(n: Any, oc: Any, *where: Any) -> Any:
        source = [where[a] * win.strides[a] + taps[a] * win.dilations[a] for a in range(rank)]
        channel = c if group == 1 else oc // each * channels + c
        return te.sum(
            cast(big(n, channel, *source), dtype) * cast(w(oc, c, *taps), dtype), axis=[c, *taps]
        )

    return te.compute((int(x.shape[0]), outputs, *spatial), element, name="conv")


@converts("Conv")
def _conv(op: Op) -> Expr:
    weights, dtype = op.shape(1), op.out_dtype()
    win = window(op, tuple(op.attr("kernel_shape", weights[2:])), op.shape()[2:])
    wide = compute_dtype(dtype)

    def conv(x: Any, w: Any, bias: Any) -> Any:
        y = conv_te(x, w, win, op.attr("group", 1), wide)
        return _with_bias(y, bias, dtype)

    return op.te(conv, op.tensor(0), op.tensor(1), op.inputs[2] if op.has(2) else None)


def _with_bias(y: Any, bias: Any, dtype: str) -> Any:
    if bias is None and kind(y) == dtype:
        return y

    def element(*index: Any) -> Any:
        value = y(*index)
        if bias is not None:
            value = value + cast(at(bias, [index[1]]), kind(value))
        return cast(value, dtype)

    return te.compute(y.shape, element, name="biased")


@converts("ConvTranspose")
def _conv_transpose(op: Op) -> Expr:
    dtype = op.out_dtype()

    def conv(x: Any, w: Any, bias: Any) -> Any:
        return _with_bias(transpose_te(op, x, w, compute_dtype(dtype)), bias, dtype)

    return op.te(conv, op.tensor(0), op.tensor(1), op.inputs[2] if op.has(2) else None)


def transpose_te(op: Op, x: Any, w: Any, wide: str) -> Any:
    """TE: the transposed convolution ``op`` of x and w[c, oc/group, …], accumulated in ``wide``.

    Gather form: output o sums taps k ≡ o + pad (mod stride), so no multiply meets a zero. With
    dilation the taps that divide are tested one by one.
    """
    weights, out = shape_of(w), op.out_shape()
    kernel = weights[2:]
    rank = len(kernel)
    strides = tuple(op.attr("strides", (1,) * rank))
    dilations = tuple(op.attr("dilations", (1,) * rank))
    begin = _transpose_pads(op, kernel, strides, dilations)
    group = op.attr("group", 1)
    each, channels = weights[1], weights[0] // group
    spatial = op.shape()[2:]
    c = te.reduce_axis((0, channels), "c")
    steps = [1 if d > 1 else s for s, d in zip(strides, dilations, strict=True)]
    taps = [te.reduce_axis((0, -(-kernel[a] // steps[a])), f"k{a}") for a in range(rank)]

    def element(n: Any, oc: Any, *where: Any) -> Any:
        source, tap, inside = [], [], []
        for a in range(rank):
            o = where[a] + begin[a]
            if dilations[a] == 1:
                k = taps[a] * strides[a] + o % strides[a]
                i = o // strides[a] - taps[a]
                inside += [k < kernel[a]] if kernel[a] % strides[a] else []
            else:
                k = taps[a]
                position = o - k * dilations[a]
                i = tirx.floordiv(position, strides[a])
                inside += [tirx.floormod(position, strides[a]) == 0]
            inside += [i >= 0, i < spatial[a]]
            source.append(i)
            tap.append(k)
        channel = c if group == 1 else oc // each * channels + c
        product_ = cast(x(n, channel, *source), wide) * cast(w(channel, oc % each, *tap), wide)
        return te.sum(
            tirx.if_then_else(tirx.all(*inside), product_, const(0, wide)), axis=[c, *taps]
        )

    return te.compute(out, element, name="conv_transpose")


def _transpose_pads(
    op: Op, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    """Padding before each axis, from pads, auto_pad or output_shape (ONNX ConvTranspose)."""
    rank = len(kernel)
    extra = tuple(op.attr("output_padding", (0,) * rank))
    full = [
        s * (n - 1) + e + (k - 1) * d + 1
        for s, n, e, k, d in zip(strides, op.shape()[2:], extra, kernel, dilations, strict=True)
    ]
    mode = op.attr("auto_pad", "NOTSET")
    if op.attr("output_shape") is None and mode == "NOTSET":
        return tuple(op.attr("pads", (0,) * 2 * rank))[:rank]
    if mode == "VALID":
        return (0,) * rank
    total = [f - o for f, o in zip(full, op.out_shape()[2:], strict=True)]
    if mode == "SAME_UPPER":
        return tuple(t // 2 for t in total)
    return tuple(t - t // 2 for t in total)
