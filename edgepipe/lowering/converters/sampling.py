"""Sampling at computed positions: GridSample, AffineGrid, RoiAlign, DeformConv."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product as cartesian
from typing import Any

import numpy as np
from tvm import te, tirx

from edgepipe.errors import UserError
from edgepipe.lowering.converters.conv import window
from edgepipe.lowering.converters.numeric import compute_dtype, round_even
from edgepipe.lowering.converters.op import Array, Expr, Op, at, cast, const
from edgepipe.lowering.converters.registry import converts


def _reflected(x: Any, n: int, align: bool) -> Any:
    """A real position mirrored into the input's range (GridSample, padding_mode=reflection)."""
    dtype = "float32"
    low, high = (0.0, n - 1.0) if align else (-0.5, n - 0.5)
    length = high - low
    if length == 0:
        return const(low, dtype) + x * const(0, dtype)
    offset = tirx.abs(x - const(low, dtype))
    turns = tirx.floor(offset / const(length, dtype))
    rest = offset - turns * const(length, dtype)
    odd = tirx.floormod(tirx.Cast("int32", turns), 2) == 1
    return tirx.Select(odd, const(high, dtype) - rest, const(low, dtype) + rest)


def _reader(
    source: Callable[..., Any], extents: Sequence[int], mode: str, align: bool
) -> Callable[[Sequence[Any]], Any]:
    """Read at integer-valued float positions, with GridSample's padding."""

    def read(position: Sequence[Any]) -> Any:
        inside, where = [], []
        for p, n in zip(position, extents, strict=True):
            v = p
            if mode == "reflection":
                v = _reflected(v, n, align)
            # Bounded before the conversion: a far position does not fit an int32.
            bounded = tirx.max(const(0, "float32"), tirx.min(v, const(n - 1, "float32")))
            where.append(tirx.Cast("int32", round_even(bounded)))
            if mode == "zeros":
                inside += [p >= const(0, "float32"), p <= const(n - 1, "float32")]
        value = source(*where)
        return tirx.Select(tirx.all(*inside), value, const(0, "float32")) if inside else value

    return read


def _cubic(t: Any) -> list[Any]:
    """Weights of the four neighbours at distance 1 + t, t, 1 − t, 2 − t with a = −0.75."""
    a = -0.75

    def c(v: float) -> Any:
        return const(v, "float32")

    def far(x: Any) -> Any:
        return ((c(a) * x - c(5 * a)) * x + c(8 * a)) * x - c(4 * a)

    def near(x: Any) -> Any:
        return ((c(a + 2) * x - c(a + 3)) * x) * x + c(1)

    one = c(1)
    return [far(t + one), near(t), near(one - t), far(c(2) - t)]


def _sample(read: Callable[[Sequence[Any]], Any], position: Sequence[Any], mode: str) -> Any:
    """Interpolated value at a real position."""
    if mode == "nearest":
        return read([round_even(p) for p in position])
    floors = [tirx.floor(p) for p in position]
    rests = [p - f for p, f in zip(position, floors, strict=True)]
    if mode == "linear":
        weights = [[const(1, "float32") - r, r] for r in rests]
        first = 0
    else:
        weights, first = [_cubic(r) for r in rests], -1
    total: Any = const(0, "float32")
    for taps in cartesian(*[range(len(w)) for w in weights]):
        where = [f + const(first + t, "float32") for f, t in zip(floors, taps, strict=True)]
        weight: Any = const(1, "float32")
        for axis, t in enumerate(taps):
            weight = weight * weights[axis][t]
        total = total + weight * read(where)
    return total


@converts("GridSample")
def _grid_sample(op: Op) -> Expr:
    """Input [N, C, (D,) H, W], grid [N, (D,) H, W, 2 or 3] with x first, in −1 … 1."""
    mode = str(op.attr("mode", "linear")).removeprefix("bi")
    padding, align = op.attr("padding_mode", "zeros"), bool(op.attr("align_corners", 0))
    extents, dtype = op.shape()[2:], op.dtype()
    rank = len(extents)

    def element(index: Any, x: Any, grid: Any) -> Any:
        n, c, *where = index

        def source(*position: Any) -> Any:
            return cast(x(n, c, *position), "float32")

        position = []
        for axis, extent in enumerate(extents):
            g = cast(grid(n, *where, rank - 1 - axis), "float32")
            if align:
                p = (g + const(1, "float32")) * const((extent - 1) / 2, "float32")
            else:
                p = ((g + const(1, "float32")) * const(extent, "float32") - const(1, "float32")) * (
                    const(0.5, "float32")
                )
            # Padding by the border needs nothing here: every neighbour is bounded when it is read.
            if padding == "reflection":
                p = _reflected(p, extent, align)
            position.append(p)
        return cast(_sample(_reader(source, extents, padding, align), position, mode), dtype)

    return op.compute(op.out_shape(), element, op.tensor(0), op.tensor(1))


@converts("AffineGrid")
def _affine_grid(op: Op) -> Expr:
    """theta [N, 2, 3] or [N, 3, 4] → grid [N, (D,) H, W, 2 or 3] of normalised positions."""
    out, align, dtype = op.out_shape(), bool(op.attr("align_corners", 0)), op.dtype()
    extents = out[1:-1]
    rank = len(extents)
    lines = [op.as_tensor(op.const(_line(n, align))) for n in extents]

    def element(index: Any, theta: Any, *axes: Any) -> Any:
        n, *where, component = index
        # x comes first: the last spatial axis is coordinate 0.
        base = [axes[rank - 1 - j](where[rank - 1 - j]) for j in range(rank)]
        total = cast(theta(n, component, rank), "float32")
        for j, b in enumerate(base):
            total = total + cast(theta(n, component, j), "float32") * b
        return cast(total, dtype)

    return op.compute(out, element, op.tensor(0), *lines)


def _line(n: int, align: bool) -> Array:
    if align:
        return np.linspace(-1, 1, n).astype(np.float32)
    return ((2 * np.arange(n) + 1) / n - 1).astype(np.float32)


@converts("RoiAlign")
def _roi_align(op: Op) -> Expr:
    """Regions [R, 4] as x1, y1, x2, y2 of image batch_indices[r] → [R, C, height, width].

    The number of sampling points depends on the region when ``sampling_ratio`` is 0, so the sum
    over points is a loop with run-time bounds.
    """
    from edgepipe.lowering.converters.loops import Kernel

    out, (_, _, height, width) = op.out_shape(), op.shape()
    ratio, scale = op.attr("sampling_ratio", 0), float(op.attr("spatial_scale", 1.0))
    half = op.attr("coordinate_transformation_mode", "half_pixel") == "half_pixel"
    maximum, dtype = op.attr("mode", "avg") == "max", op.dtype()
    rows, columns = out[2], out[3]
    one = const(1, "float32")

    def bins(start: Any, end: Any, count: int) -> tuple[Any, Any]:
        offset = const(0.5 if half else 0.0, "float32")
        first = cast(start, "float32") * const(scale, "float32") - offset
        extent = cast(end, "float32") * const(scale, "float32") - offset - first
        if not half:
            extent = tirx.max(extent, one)
        return first, extent * const(1.0 / count, "float32")

    def points(size: Any) -> Any:
        return ratio if ratio > 0 else tirx.Cast("int32", tirx.ceil(size))

    with Kernel(op, "roi_align", outputs=[0]) as k:
        x, rois, images, y = k.input(0), k.input(1), k.input(2), k.output(0)
        total = k.local("float32")
        with k.nest(*out) as (r, c, i, j):
            top, bin_h = bins(rois[r, 1], rois[r, 3], rows)
            left, bin_w = bins(rois[r, 0], rois[r, 2], columns)
            count_h, count_w = points(bin_h), points(bin_w)
            image = tirx.max(
                const(0, "int64"),
                tirx.min(cast(images[r], "int64"), const(op.shape()[0] - 1, "int64")),
            )
            total[0] = const(-np.inf if maximum else 0, "float32")
            with k.each(count_h) as p, k.each(count_w) as q:
                yy = top + bin_h * (
                    cast(i, "float32")
                    + (cast(p, "float32") + const(0.5, "float32")) / cast(count_h, "float32")
                    if not isinstance(count_h, int)
                    else cast(i, "float32")
                    + (cast(p, "float32") + const(0.5, "float32")) * const(1.0 / count_h, "float32")
                )
                xx = left + bin_w * (
                    cast(j, "float32")
                    + (cast(q, "float32") + const(0.5, "float32")) / cast(count_w, "float32")
                    if not isinstance(count_w, int)
                    else cast(j, "float32")
                    + (cast(q, "float32") + const(0.5, "float32")) * const(1.0 / count_w, "float32")
                )
                terms = _roi_terms(x, image, c, (yy, xx), (height, width))
                if maximum:
                    best = terms[0]
                    for term in terms[1:]:
                        best = tirx.max(best, term)
                    total[0] = tirx.max(total[0], best)
                else:
                    total[0] = total[0] + sum(terms[1:], start=terms[0])
            if maximum:
                empty = total[0] == const(-np.inf, "float32")
                y[r, c, i, j] = cast(tirx.Select(empty, const(0, "float32"), total[0]), dtype)
            else:
                count = tirx.max(count_h * count_w, 1)
                y[r, c, i, j] = cast(total[0] / cast(count, "float32"), dtype)
    return k.results[0]


def _roi_terms(
    x: Any, image: Any, c: Any, position: tuple[Any, Any], extents: tuple[int, int]
) -> list[Any]:
    """The four weighted neighbours of a sampling point; zero outside the image by over a pixel."""
    zero, one = const(0, "float32"), const(1, "float32")
    lows, highs, rests, inside = [], [], [], []
    for p, n in zip(position, extents, strict=True):
        inside += [p >= const(-1, "float32"), p <= const(n, "float32")]
        v = tirx.min(tirx.max(p, zero), const(n - 1, "float32"))
        low = tirx.Cast("int32", v)
        lows.append(low)
        highs.append(tirx.min(low + 1, n - 1))
        rests.append(v - tirx.Cast("float32", low))
    (y0, x0), (y1, x1), (ry, rx) = lows, highs, rests
    corners = [
        (y0, x0, (one - ry) * (one - rx)),
        (y0, x1, (one - ry) * rx),
        (y1, x0, ry * (one - rx)),
        (y1, x1, ry * rx),
    ]
    valid = tirx.all(*inside)
    return [
        tirx.Select(valid, weight * cast(x[image, c, row, column], "float32"), zero)
        for row, column, weight in corners
    ]


@converts("DeformConv")
def _deform_conv(op: Op) -> Expr:
    """Convolution whose taps are moved by ``offset`` and scaled by ``mask`` (2-D).

    x [N, C, H, W], w [O, C/group, kh, kw], offset [N, groups·kh·kw·2, oh, ow].
    """
    if len(op.shape()) != 4:
        raise op.unsupported(f"{len(op.shape()) - 2} spatial axes", "only 2-D is compiled")
    weights, dtype, out = op.shape(1), op.dtype(), op.out_shape()
    kernel = tuple(op.attr("kernel_shape", weights[2:]))
    win = window(op, kernel, op.shape()[2:])
    group, offset_groups = op.attr("group", 1), op.attr("offset_group", 1)
    wide, taps = compute_dtype(dtype), kernel[0] * kernel[1]
    wanted = {1: (out[1], op.shape()[1] // group, *kernel)}
    for number, values in ((2, 2 * taps), (4, taps)):  # of each tap two coordinates, a factor
        wanted[number] = (out[0], offset_groups * values, *out[2:])
    for number, shape in wanted.items():
        found = tuple(op.shape(number)) if op.has(number) else shape
        if found != shape:
            raise UserError(
                f"input {number} of DeformConv has shape {list(found)}, not {list(shape)}",
                where=op.node.name or None,
                fix="correct kernel_shape, group or offset_group",
            )
    shared = op.shape()[1] // offset_groups

    def conv(x: Any, w: Any, offset: Any, bias: Any, mask: Any) -> Any:
        def sampled(n: Any, c: Any, t: Any, i: Any, j: Any) -> Any:
            row, column = t // kernel[1], t % kernel[1]
            at_offset = ((c // shared) * taps + t) * 2
            start = (
                i * win.strides[0] - win.begin[0] + row * win.dilations[0],
                j * win.strides[1] - win.begin[1] + column * win.dilations[1],
            )
            position = [
                cast(s, "float32") + cast(offset(n, at_offset + a, i, j), "float32")
                for a, s in enumerate(start)
            ]

            def source(*where: Any) -> Any:
                return cast(x(n, c, *where), "float32")

            value = _sample(_reader(source, op.shape()[2:], "zeros", True), position, "linear")
            if mask is not None:
                value = value * cast(mask(n, (c // shared) * taps + t, i, j), "float32")
            return value

        columns = te.compute((out[0], op.shape()[1], taps, out[2], out[3]), sampled, name="columns")
        c = te.reduce_axis((0, weights[1]), "c")
        t = te.reduce_axis((0, taps), "t")
        each = out[1] // group

        def element(n: Any, o: Any, i: Any, j: Any) -> Any:
            channel = o // each * weights[1] + c
            weight = cast(w(o, c, t // kernel[1], t % kernel[1]), wide)
            return te.sum(columns(n, channel, t, i, j) * weight, axis=[c, t])

        y = te.compute(out, element, name="deform_conv")

        def finish(*i: Any) -> Any:
            value = y(*i)
            if bias is not None:
                value = value + cast(at(bias, [i[1]]), wide)
            return cast(value, dtype)

        return te.compute(out, finish, name="out")

    bias = op.inputs[3] if op.has(3) else None
    mask = op.tensor(4) if op.has(4) else None
    return op.te(conv, op.tensor(0), op.tensor(1), op.tensor(2), bias, mask)
