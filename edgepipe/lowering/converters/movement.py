"""Operators that only move elements: reshape, transpose, slice, pad, concat, split, tile, …"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.lowering.converters.numeric import zero
from edgepipe.lowering.converters.op import Expr, Op, at, axis_of, const
from edgepipe.lowering.converters.registry import converts


@converts("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(op: Op) -> Expr:
    return op.reshape(op.inputs[0], op.out_shape())


@converts("Transpose")
def _transpose(op: Op) -> Expr:
    shape = op.shape()
    perm = list(op.attr("perm", tuple(reversed(range(len(shape))))))
    # Moving axes of extent 1 changes no byte.
    moved = [p for p in perm if shape[p] != 1]
    if moved == sorted(moved):
        return op.reshape(op.inputs[0], op.out_shape())

    def element(index: Any, x: Any) -> Any:
        source = [None] * len(perm)
        for i, p in zip(index, perm, strict=True):
            source[p] = i
        return x(*source)

    return op.compute(op.out_shape(), element, op.tensor(0))


@converts("Expand")
def _expand(op: Op) -> Expr:
    return op.compute(op.out_shape(), lambda i, x: at(x, i), op.inputs[0])


@converts("Tile")
def _tile(op: Op) -> Expr:
    shape = op.shape()

    def element(index: Any, x: Any) -> Any:
        return x(
            *[i if o == s else i % s for i, s, o in zip(index, shape, op.out_shape(), strict=True)]
        )

    return op.compute(op.out_shape(), element, op.tensor(0))


@converts("Concat")
def _concat(op: Op) -> Expr:
    out = op.out_shape()
    axis = axis_of(op.attr("axis"), len(out))
    parts = [i for i in range(len(op.inputs)) if op.shape(i)[axis] > 0]
    if len(parts) == 1:
        return op.inputs[parts[0]]
    starts = np.cumsum([0, *[op.shape(i)[axis] for i in parts]])

    def element(index: Any, *tensors: Any) -> Any:
        index = list(index)

        def read(k: int) -> Any:
            moved = [*index[:axis], index[axis] - int(starts[k]), *index[axis + 1 :]]
            return tensors[k](*moved)

        value = read(len(tensors) - 1)
        for k in range(len(tensors) - 2, -1, -1):
            value = tirx.if_then_else(index[axis] < int(starts[k + 1]), read(k), value)
        return value

    return op.compute(out, element, *[op.tensor(i) for i in parts])


@converts("Split")
def _split(op: Op) -> list[Expr]:
    axis = axis_of(op.attr("axis", 0), len(op.shape()))
    results: list[Any] = []
    start = 0
    for k in range(len(op.node.outputs)):
        shape = op.out_shape(k)
        begin = [0] * len(shape)
        begin[axis] = start
        results.append(_window(op, shape, begin, [1] * len(shape)))
        start += shape[axis]
    return results


def _window(op: Op, shape: tuple[int, ...], begin: list[int], step: list[int]) -> Expr:
    """Elements begin + step·i of every axis of the first input."""
    if shape == op.shape():
        if all(s == 1 for s in step):
            return op.inputs[0]
    elif 0 in shape:
        return op.const(np.zeros(shape, op.dtype()))

    def element(index: Any, x: Any) -> Any:
        return x(*[b + i * s for i, b, s in zip(index, begin, step, strict=True)])

    return op.compute(shape, element, op.tensor(0))


@converts("Slice")
def _slice(op: Op) -> Expr:
    shape = op.shape()
    starts, ends = op.static(1, "starts"), op.static(2, "ends")
    axes = op.static(3, "axes") if op.has(3) else np.arange(len(starts))
    steps = op.static(4, "steps") if op.has(4) else np.ones(len(starts), np.int64)
    begin, stride, out = [0] * len(shape), [1] * len(shape), list(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        a = axis_of(int(axis), len(shape))
        taken = range(*slice(int(start), int(end), int(step)).indices(shape[a]))
        begin[a], stride[a], out[a] = taken.start, int(step), len(taken)
        # slice() reads an end below -n as "through the first element"; so does ONNX.
    return _window(op, tuple(out), begin, stride)


@converts("Pad")
def _pad(op: Op) -> Expr:
    shape, mode = op.shape(), op.attr("mode", "constant")
    rank = len(shape)
    pads = op.static(1, "pads")
    axes = [axis_of(int(a), rank) for a in op.static(3, "axes")] if op.has(3) else range(rank)
    before = [0] * rank
    for k, axis in enumerate(axes):
        before[axis] = int(pads[k])
    out = op.out_shape()
    after = [o - n - b for o, n, b in zip(out, shape, before, strict=True)]

    def element(index: Any, x: Any, value: Any) -> Any:
        source, inside = [], []
        for a in range(rank):
            i = index[a] - before[a]
            if before[a] <= 0 and after[a] <= 0:
                source.append(i)
            elif mode == "constant":
                inside += [i >= 0] if before[a] > 0 else []
                inside += [i < shape[a]] if after[a] > 0 else []
                source.append(i)
            else:
                # Negative pads crop before the rest is mirrored or repeated.
                low, high = max(0, -before[a]), shape[a] + min(0, after[a])
                source.append(low + _reflected(i - low, high - low, mode))
        if not inside:
            return x(*source)
        fill = (
            zero(x)
            if value is None
            else value
            if not hasattr(value, "shape")
            else at(value, [0] * len(value.shape))
        )
        return tirx.if_then_else(tirx.all(*inside), x(*source), fill)

    return op.compute(out, element, op.tensor(0), op.inputs[2] if op.has(2) else None)


def _reflected(i: Any, n: int, mode: str) -> Any:
    """Source index of position ``i`` outside 0…n−1."""
    if mode == "edge":
        return tirx.max(0, tirx.min(i, n - 1))
    if mode == "wrap":
        return tirx.floormod(i, n)
    if n == 1:
        return i * 0
    period = 2 * (n - 1)
    folded = tirx.floormod(i, period)
    return tirx.min(folded, period - folded)


@converts("DepthToSpace")
def _depth_to_space(op: Op) -> Expr:
    b, mode = op.attr("blocksize"), op.attr("mode", "DCR")
    depth = op.out_shape()[1]

    def element(index: Any, x: Any) -> Any:
        n, c, h, w = index
        offset = (h % b) * b + w % b
        channel = offset * depth + c if mode == "DCR" else c * b * b + offset
        return x(n, channel, h // b, w // b)

    return op.compute(op.out_shape(), element, op.tensor(0))


@converts("SpaceToDepth")
def _space_to_depth(op: Op) -> Expr:
    b, mode = op.attr("blocksize"), op.attr("mode", "DCR")
    depth = op.shape()[1]

    def element(index: Any, x: Any) -> Any:
        n, c, h, w = index
        offset, channel = (c // depth, c % depth) if mode == "DCR" else (c % (b * b), c // (b * b))
        return x(n, channel, h * b + offset // b, w * b + offset % b)

    return op.compute(op.out_shape(), element, op.tensor(0))


@converts("Trilu")
def _trilu(op: Op) -> Expr:
    k = int(op.static(1, "k").reshape(())) if op.has(1) else 0
    upper = op.attr("upper", 1)

    def element(index: Any, x: Any) -> Any:
        offset = index[-1] - index[-2]
        keep = offset >= k if upper else offset <= k
        v = x(*index)
        return tirx.Select(keep, v, zero(v))

    return op.compute(op.out_shape(), element, op.tensor(0))


@converts("EyeLike")
def _eye_like(op: Op) -> Expr:
    rows, columns = op.out_shape()
    return op.const(np.eye(rows, columns, op.attr("k", 0), dtype=op.out_dtype()))


@converts("Range", "ConstantOfShape", "Shape", "Size", "Constant")
def _known(op: Op) -> Expr:
    """Operators whose result depends on constants and static shapes alone."""
    dtype = op.out_dtype()
    if op.type == "Constant":
        for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
            if op.attr(name) is not None:
                return op.const(np.array(op.attr(name), dtype))
        raise op.unsupported("only numeric constants")
    if op.type == "Range":
        start, limit, delta = (
            op.static(i, n).reshape(()) for i, n in enumerate(("start", "limit", "delta"))
        )
        count = op.out_shape()[0]
        del limit
        return op.const((start + np.arange(count) * delta).astype(dtype))
    if op.type == "ConstantOfShape":
        value = op.attr("value")
        fill = np.zeros(1, dtype) if value is None else value
        return op.const(np.full(op.out_shape(), fill.reshape(()), dtype))
    if op.type == "Size":
        return op.const(np.array(int(np.prod(op.shape())), np.int64))
    rank = len(op.shape())
    return op.const(np.array(op.shape()[op.attr("start", 0) : op.attr("end", rank)], np.int64))


@converts("CenterCropPad")
def _center_crop_pad(op: Op) -> Expr:
    shape, out = op.shape(), op.out_shape()
    begin = [(s - o) // 2 if s > o else -((o - s) // 2) for s, o in zip(shape, out, strict=True)]

    def element(index: Any, x: Any) -> Any:
        source = [i + b for i, b in zip(index, begin, strict=True)]
        inside = []
        for i, s, o in zip(source, shape, out, strict=True):
            inside += [i >= 0, i < s] if o > s else []
        value = x(*source)
        return tirx.if_then_else(tirx.all(*inside), value, zero(value)) if inside else value

    return op.compute(out, element, op.tensor(0))


@converts("ReverseSequence")
def _reverse_sequence(op: Op) -> Expr:
    time, batch = op.attr("time_axis", 0), op.attr("batch_axis", 1)

    def element(index: Any, x: Any, lengths: Any) -> Any:
        length = tirx.Cast("int64", lengths(index[batch]))
        source, position = list(index), tirx.Cast("int64", index[time])
        source[time] = tirx.Select(position < length, length - 1 - position, position)
        return x(*source)

    return op.compute(op.out_shape(), element, op.tensor(0), op.tensor(1))


@converts("OneHot")
def _one_hot(op: Op) -> Expr:
    out, dtype = op.out_shape(), op.out_dtype()
    axis = axis_of(op.attr("axis", -1), len(out))
    depth = out[axis]

    def element(index: Any, hot: Any, values: Any) -> Any:
        rest = [*index[:axis], *index[axis + 1 :]]
        k = tirx.Cast("int64", at(hot, rest))
        wrapped = tirx.Select(k < const(0, "int64"), k + const(depth, "int64"), k)
        return tirx.Select(wrapped == tirx.Cast("int64", index[axis]), values(1), values(0))

    result = op.compute(out, element, op.inputs[0], op.tensor(2))
    del dtype
    return result
