"""Resize and Upsample: every mode, by tables of source indices and weights per axis.

A resized axis is a sparse matrix with a few taps per output position; the tables are computed
here in float64 as the ONNX Resize definition says, and applied axis by axis. Nearest needs the
indices alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import te, tirx

from edgepipe.lowering.converters.numeric import compute_dtype
from edgepipe.lowering.converters.op import Array, Expr, Op, axis_of, cast, const
from edgepipe.lowering.converters.registry import converts


@dataclass(frozen=True)
class AxisTable:
    """Output position o of an axis is Σ_t weights[o, t] · x[indices[o, t]].

    ``outside[o]`` marks positions tf_crop_and_resize fills with the extrapolation value.
    """

    indices: Array
    weights: Array
    outside: Array


@dataclass(frozen=True)
class Rule:
    """Attributes of Resize that shape a table."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    antialias: bool
    exclude_outside: bool


def source_positions(rule: Rule, n: int, out: int, scale: float, roi: tuple[float, float]) -> Array:
    """Real-valued source coordinate of every output position (ONNX Resize, coordinate modes)."""
    o = np.arange(out, dtype=np.float64)
    exact = scale * n
    kind = rule.coordinates
    if kind == "half_pixel":
        return (o + 0.5) / scale - 0.5
    if kind == "half_pixel_symmetric":
        offset = n / 2 * (1 - out / exact)
        return offset + (o + 0.5) / scale - 0.5
    if kind == "pytorch_half_pixel":
        # By the length that there is: ONNX's own evaluator takes the scaled one, 1.5 for 1.
        return (o + 0.5) / scale - 0.5 if out > 1 else np.zeros(out)
    if kind == "align_corners":
        return o * (n - 1) / (exact - 1) if exact != 1 else np.zeros(out)
    if kind == "asymmetric":
        return o / scale
    if kind == "tf_half_pixel_for_nn":
        return (o + 0.5) / scale
    start, end = roi
    if exact <= 1:
        return np.full(out, 0.5 * (start + end) * (n - 1))
    return start * (n - 1) + o * (end - start) * (n - 1) / (exact - 1)


def _nearest(position: Array, mode: str) -> Array:
    floor, ceil = np.floor(position), np.ceil(position)
    if mode == "floor":
        return floor
    if mode == "ceil":
        return ceil
    if mode == "round_prefer_ceil":
        return np.floor(position + 0.5)
    return np.ceil(position - 0.5)


def _kernel(distance: Array, rule: Rule) -> Array:
    """Interpolation weight at a distance from the source position."""
    d = np.abs(distance)
    if rule.mode == "linear":
        return np.asarray(np.maximum(1 - d, 0))
    a = rule.cubic
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def axis_table(rule: Rule, n: int, out: int, scale: float, roi: tuple[float, float]) -> AxisTable:
    """The table of one axis of ``n`` elements resized to ``out``."""
    position = source_positions(rule, n, out, scale, roi)
    outside = np.zeros(out, np.bool_)
    if rule.coordinates == "tf_crop_and_resize":
        outside = (position < 0) | (position > n - 1)
    if rule.mode == "nearest":
        # The definition is in real numbers: keep 2.5 from becoming 2.4999999.
        index = _nearest(np.round(position, 9), rule.nearest)
        index = np.clip(index, 0, n - 1).astype(np.int32)
        return AxisTable(index[:, None], np.ones((out, 1)), outside)
    # An antialiased kernel is stretched by the inverse scale when shrinking.
    stretch = min(scale, 1.0) if rule.antialias else 1.0
    support = (1 if rule.mode == "linear" else 2) / stretch
    first = np.floor(position - support).astype(np.int64) + 1
    if stretch == 1.0:
        first = np.floor(position).astype(np.int64) - (0 if rule.mode == "linear" else 1)
    taps = int(2 * np.ceil(support)) + (1 if stretch < 1 else 0)
    raw = first[:, None] + np.arange(taps)[None, :]
    weights = _kernel((raw - position[:, None]) * stretch, rule)
    if rule.exclude_outside:
        weights = np.where((raw < 0) | (raw >= n), 0.0, weights)
    total = weights.sum(axis=1, keepdims=True)
    if rule.exclude_outside or stretch < 1:
        weights = weights / np.where(total == 0, 1, total)
    return AxisTable(np.clip(raw, 0, n - 1).astype(np.int32), weights, outside)


@converts("Resize", "Upsample")
def _resize(op: Op) -> Expr:
    shape, out = op.shape(), op.out_shape()
    rule = Rule(
        mode=op.attr("mode", "nearest").replace("bilinear", "linear"),
        coordinates="asymmetric"
        if op.type == "Upsample"
        else op.attr("coordinate_transformation_mode", "half_pixel"),
        nearest="floor" if op.type == "Upsample" else op.attr("nearest_mode", "round_prefer_floor"),
        cubic=op.attr("cubic_coeff_a", -0.75),
        antialias=bool(op.attr("antialias", 0)),
        exclude_outside=bool(op.attr("exclude_outside", 0)),
    )
    tables = {}
    for axis, scale, roi in _axes(op):
        identity = shape[axis] == out[axis] and scale == 1.0
        if not identity or rule.coordinates == "tf_crop_and_resize":
            tables[axis] = axis_table(rule, shape[axis], out[axis], scale, roi)
    if not tables:
        return op.inputs[0]
    if rule.mode == "nearest":
        result = _gather(op, op.inputs[0], tables)
    else:
        result = op.inputs[0]
        # Shrinking axes first keeps the intermediate small.
        for axis in sorted(tables, key=lambda a: out[a] / shape[a]):
            result = _interpolate(op, result, axis, tables[axis])
        result = _cast(op, result)
    return _extrapolate(op, result, tables)


def _axes(op: Op) -> list[tuple[int, float, tuple[float, float]]]:
    """(axis, scale, roi) of every resized axis."""
    shape, out = op.shape(), op.out_shape()
    rank = len(shape)
    axes = [axis_of(a, rank) for a in op.attr("axes", tuple(range(rank)))]
    policy = op.attr("keep_aspect_ratio_policy", "stretch")
    scales_input = 1 if op.type == "Upsample" else 2
    given = op.constant(scales_input)
    if op.has(scales_input) and given is None:
        raise op.unsupported("'scales' is computed at run time")
    has_sizes = op.type == "Resize" and op.has(3)
    if given is None or given.size == 0 or has_sizes:
        scales = [out[a] / shape[a] for a in axes]
        if policy != "stretch":
            sizes = op.static(3, "sizes")
            ratio = [float(s) / shape[a] for s, a in zip(sizes, axes, strict=True)]
            pick = min(ratio) if policy == "not_larger" else max(ratio)
            scales = [pick] * len(axes)
    else:
        scales = [float(s) for s in given]
    roi = op.constant(1) if op.type == "Resize" else None
    if op.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        roi = op.static(1, "roi")
    half = len(axes)
    bounds = [0.0] * half + [1.0] * half if roi is None or roi.size == 0 else roi.tolist()
    regions = [(bounds[i], bounds[half + i]) for i in range(half)]
    return list(zip(axes, scales, regions, strict=True))


def _repeats(indices: Array) -> int:
    """r when the table is o → o // r, so that no table is needed; else 0."""
    flat = indices[:, 0]
    if flat[-1] < 0 or len(flat) % (int(flat.max()) + 1):
        return 0
    r = len(flat) // (int(flat.max()) + 1)
    return r if np.array_equal(flat, np.arange(len(flat)) // r) else 0


def _gather(op: Op, x: Expr, tables: dict[int, AxisTable]) -> Expr:
    out = op.out_shape()
    direct = {a: _repeats(t.indices) for a, t in tables.items()}
    looked_up = [a for a in tables if not direct[a]]
    constants = [op.const(tables[a].indices[:, 0]) for a in looked_up]

    def element(index: Any, source: Any, *found: Any) -> Any:
        where = list(index)
        for a in tables:
            if direct[a]:
                where[a] = index[a] // direct[a]
        for a, table in zip(looked_up, found, strict=True):
            where[a] = table(index[a]) if table.shape else const(table.value, "int32")
        return source(*where)

    return op.compute(out, element, op.as_tensor(x), *constants)


def _interpolate(op: Op, x: Expr, axis: int, table: AxisTable) -> Expr:
    shape = list(op.shape_of(x))
    shape[axis] = len(table.indices)
    wide = compute_dtype(op.dtype()) if op.dtype().startswith("float") else "float32"
    taps = table.indices.shape[1]
    indices = op.as_tensor(op.const(table.indices))
    weights = op.as_tensor(op.const(table.weights.astype(wide)))

    def tap(index: Any, t: Any, source: Any, where: Any, weight: Any) -> Any:
        moved = [*index[:axis], where(index[axis], t), *index[axis + 1 :]]
        return weight(index[axis], t) * cast(source(*moved), wide)

    def few(index: Any, *tensors: Any) -> Any:
        value = tap(index, 0, *tensors)
        for t in range(1, taps):
            value = value + tap(index, t, *tensors)
        return value

    def many(*tensors: Any) -> Any:
        t = te.reduce_axis((0, taps), "t")
        return te.compute(
            tuple(shape), lambda *i: te.sum(tap(i, t, *tensors), axis=t), name="resize"
        )

    if taps <= 4:
        return op.compute(tuple(shape), few, op.as_tensor(x), indices, weights)
    return op.te(many, op.as_tensor(x), indices, weights)


def _cast(op: Op, x: Expr) -> Expr:
    dtype = op.out_dtype()
    if str(x.ty.dtype) == dtype:
        return x

    def convert(v: Any) -> Any:
        if dtype.startswith("float"):
            return cast(v, dtype)
        info = np.iinfo(dtype)
        low, high = const(float(info.min), "float32"), const(float(info.max), "float32")
        return cast(tirx.max(low, tirx.min(high, tirx.trunc(v))), dtype)

    return op.compute(op.shape_of(x), lambda i, v: convert(v(*i)), op.as_tensor(x))


def _extrapolate(op: Op, x: Expr, tables: dict[int, AxisTable]) -> Expr:
    masks = {a: t.outside for a, t in tables.items() if t.outside.any()}
    if not masks:
        return x
    value, dtype = op.attr("extrapolation_value", 0.0), op.out_dtype()

    def element(index: Any, source: Any, *outside: Any) -> Any:
        hit = [mask(index[a]) for a, mask in zip(masks, outside, strict=True)]
        return tirx.Select(tirx.any(*hit), const(value, dtype), source(*index))

    constants = [op.as_tensor(op.const(m)) for m in masks.values()]
    return op.compute(op.out_shape(), element, op.as_tensor(x), *constants)
