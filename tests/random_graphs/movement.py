"""Makers of operators that move elements."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tests.random_graphs.builder import Builder, RejectedError, Value
from tests.random_graphs.makers import maker


def axis_of(g: Builder, rank: int) -> int:
    """An axis, counted from the front or from the back."""
    if rank == 0:
        raise RejectedError("a scalar has no axes")
    axis = g.rng.randrange(rank)
    return axis - rank if g.rng.random() < 0.4 else axis


def axes_of(g: Builder, rank: int, least: int = 1) -> list[int]:
    """Some different axes, in any order."""
    if rank < least:
        raise RejectedError("too few axes")
    chosen = g.rng.sample(range(rank), g.rng.randint(least, rank))
    return [a - rank if g.rng.random() < 0.3 and g.opset >= 11 else a for a in chosen]


def given_axes(g: Builder, op: str, x: Value, axes: list[int], since: int, **rest: Any) -> None:
    """Add ``op`` with axes as an input, or as an attribute before opset ``since``."""
    if g.opset >= since:
        g.add(op, [x, g.integers(axes)], **rest)
    else:
        g.add(op, [x], axes=axes, **rest)


@maker(image=1, sequence=2, any=2, integer=2)
def reshape(g: Builder) -> None:
    x = g.pick("fiub")
    size, shape = x.array.size, []
    while size > 1 and len(shape) < 4:
        factor = g.rng.choice([d for d in range(1, size + 1) if size % d == 0])
        shape.append(factor)
        size //= factor
    shape.append(size)
    if g.rng.random() < 0.4 and shape:
        shape[g.rng.randrange(len(shape))] = -1
    elif shape and x.array.ndim and shape[0] == x.shape[0]:
        shape[0] = 0
    g.add("Reshape", [x, g.integers(shape)])


@maker(sequence=2, any=2, image=1, integer=1)
def transpose(g: Builder) -> None:
    x = g.pick("fiub", least=1)
    perm = g.rng.sample(range(x.array.ndim), x.array.ndim)
    g.add("Transpose", [x], perm=None if g.rng.random() < 0.2 else perm)


@maker(image=1)
def transpose_space(g: Builder) -> None:
    x = g.pick("f", least=4, most=4)
    g.add("Transpose", [x], perm=g.rng.choice([[0, 1, 3, 2], [0, 2, 3, 1], [0, 3, 1, 2]]))


@maker(any=2, integer=1)
def squeeze(g: Builder) -> None:
    x = g.pick("fiub")
    ones = [i for i, d in enumerate(x.shape) if d == 1]
    if ones and g.rng.random() < 0.6:
        given_axes(g, "Squeeze", x, g.rng.sample(ones, g.rng.randint(1, len(ones))), 13)
    elif x.array.ndim < 5:
        given_axes(g, "Unsqueeze", x, [axis_of(g, x.array.ndim + 1) if g.opset >= 11 else 0], 13)


@maker(any=1, image=1)
def flatten(g: Builder) -> None:
    x = g.pick("f")
    g.add("Flatten", [x], axis=g.rng.randint(0 if g.opset < 11 else -x.array.ndim, x.array.ndim))


@maker(image=1, any=2, sequence=1, integer=1)
def slice_(g: Builder) -> None:
    x = g.pick("fiub", least=1)
    axes = axes_of(g, x.array.ndim)
    starts, ends, steps = [], [], []
    for axis in axes:
        size = x.shape[axis]
        step = g.rng.choice([1, 1, 1, 2, 3, -1, -2]) if g.opset >= 10 else 1
        first, last = sorted(g.rng.randint(0, size) for _ in range(2))
        if step > 0:
            starts.append(first - size if g.rng.random() < 0.2 and first < size else first)
            ends.append(g.rng.choice([last, 2**31]))
        else:
            starts.append(last)
            ends.append(g.rng.choice([first, -(2**31)]))
        steps.append(step)
    if g.opset < 10:
        g.add("Slice", [x], starts=starts, ends=ends, axes=axes)
    else:
        g.add("Slice", [x, *(g.integers(v) for v in (starts, ends, axes, steps))])


@maker(image=1, any=1, sequence=1)
def split(g: Builder) -> None:
    x = g.pick("fi", least=1)
    axis = axis_of(g, x.array.ndim) if g.opset >= 11 else g.rng.randrange(x.array.ndim)
    size = x.shape[axis]
    if size < 2:
        raise RejectedError("nothing to split")
    first = g.rng.randint(1, size - 1)
    parts = [first, size - first]
    if g.opset >= 13:
        g.add("Split", [x, g.integers(parts)], outputs=2, axis=axis)
    else:
        g.add("Split", [x], outputs=2, axis=axis, split=parts)


@maker(image=3, any=2, sequence=1, integer=1)
def concat(g: Builder) -> None:
    x = g.pick("fiub", least=1)
    axis = 1 if x.array.ndim == 4 and g.rng.random() < 0.7 else g.rng.randrange(x.array.ndim)

    def rest(v: Value) -> tuple[int, ...]:
        return (*v.shape[:axis], *v.shape[axis + 1 :])

    fits = [v for v in g.values if v.array.ndim == x.array.ndim and v.dtype == x.dtype]
    fits = [v for v in fits if rest(v) == rest(x)]
    parts = [x, *g.rng.choices(fits, k=g.rng.randint(1, 2))]
    if g.rng.random() < 0.2:
        shape = (*x.shape[:axis], 2, *x.shape[axis + 1 :])
        parts.append(g.constant(g.contents(shape, x.dtype)))
    g.rng.shuffle(parts)
    back = g.opset >= 11 and g.rng.random() < 0.3
    g.add("Concat", parts, axis=axis - x.array.ndim if back else axis)


@maker(image=2, any=2)
def pad(g: Builder) -> None:
    x = g.pick("f", least=1)
    mode = g.rng.choice(["constant", "constant", "reflect", "edge", "wrap"])
    if mode == "wrap" and g.opset < 19:
        mode = "edge"
    before, after = ([0] * x.array.ndim for _ in range(2))
    for axis in range(x.array.ndim):
        if axis >= x.array.ndim - 2 or g.rng.random() < 0.2:
            most = min(2, x.shape[axis] - 1) if mode != "constant" else 2
            before[axis], after[axis] = g.rng.randint(0, most), g.rng.randint(0, most)
    fill = g.rng.choice([0.0, 0.0, 1.5])
    if g.opset < 11:
        g.add("Pad", [x], mode=mode, pads=before + after, value=fill)
        return
    value = [g.constant(np.asarray(fill, x.dtype))] if mode == "constant" else []
    g.add("Pad", [x, g.integers(before + after), *value], mode=mode)


@maker(any=1, integer=1)
def expand(g: Builder) -> None:
    x = g.pick("fiub", most=4)
    shape = [g.rng.choice([2, 3]) if d == 1 else g.rng.choice([1, d]) for d in x.shape]
    g.add("Expand", [x, g.integers(([2] if g.rng.random() < 0.3 else []) + shape)])


@maker(any=1, integer=1)
def tile(g: Builder) -> None:
    x = g.pick("fiub", least=1, most=4, size=300)
    g.add("Tile", [x, g.integers([g.rng.choice([1, 1, 2, 3]) for _ in x.shape])])


@maker(any=2, sequence=1)
def gather(g: Builder) -> None:
    x = g.pick("fi", least=1)
    axis = axis_of(g, x.array.ndim)
    size = x.shape[axis]
    low = -size if g.opset >= 11 else 0
    shape = g.rng.choice([(), (1,), (3,), (2, 2)])
    indices = g.numbers.integers(low, size, shape)
    g.add("Gather", [x, g.integers(indices)], axis=axis if g.opset >= 11 else axis % x.array.ndim)


@maker(any=2)
def gather_elements(g: Builder) -> None:
    x = g.pick("f", least=1)
    axis = axis_of(g, x.array.ndim)
    shape = [g.rng.randint(1, d) for d in x.shape]
    indices = g.integers(g.numbers.integers(-x.shape[axis], x.shape[axis], shape))
    if g.opset < 11:
        raise RejectedError("not yet there")
    if g.rng.random() < 0.5:
        g.add("GatherElements", [x, indices], axis=axis)
        return
    unique = np.stack([g.numbers.permutation(x.shape[axis])[: shape[axis]]
                       for _ in range(math.prod(shape) // shape[axis])])  # fmt: skip
    order = [d for i, d in enumerate(shape) if i != axis % x.array.ndim]
    moved = np.moveaxis(unique.reshape(*order, shape[axis]), -1, axis % x.array.ndim)
    updates = g.constant(g.contents(shape, x.dtype))
    reduction = {}
    if g.opset >= 18:
        reduction = {"reduction": g.rng.choice(["none", "add", "mul", "max", "min"])}
    g.add("ScatterElements", [x, g.integers(moved), updates], axis=axis, **reduction)


@maker(any=1)
def gather_nd(g: Builder) -> None:
    x = g.pick("f", least=1, most=4)
    depth = g.rng.randint(1, x.array.ndim)
    indices = [[g.rng.randrange(-d, d) for d in x.shape[:depth]] for _ in range(3)]
    if g.opset < 11:
        raise RejectedError("not yet there")
    if g.rng.random() < 0.5:
        g.add("GatherND", [x, g.integers(indices)])
        return
    positive = {tuple(i % d for i, d in zip(row, x.shape, strict=False)) for row in indices}
    rows = sorted(positive)
    updates = g.constant(g.contents((len(rows), *x.shape[depth:]), x.dtype))
    g.add("ScatterND", [x, g.integers(rows), updates])


@maker(image=2)
def blocks(g: Builder) -> None:
    x = g.pick("f", least=4, most=4)
    size = g.rng.choice([2, 2, 3])
    if g.rng.random() < 0.5 and x.shape[1] % size**2 == 0:
        mode = {"mode": g.rng.choice(["DCR", "CRD"])} if g.opset >= 11 else {}
        g.add("DepthToSpace", [x], blocksize=size, **mode)
    elif x.shape[2] % size == 0 and x.shape[3] % size == 0:
        g.add("SpaceToDepth", [x], blocksize=size)


@maker(image=1)
def channel_shuffle(g: Builder) -> None:
    x = g.pick("f", least=4, most=4)
    n, c, h, w = x.shape
    groups = next((k for k in (2, 3, 5) if c % k == 0 and c > k), None)
    if groups is None:
        raise RejectedError("no groups")
    (parts,) = g.add("Reshape", [x, g.integers([n, groups, c // groups, h, w])])
    (mixed,) = g.add("Transpose", [parts], perm=[0, 2, 1, 3, 4])
    g.add("Reshape", [mixed, g.integers([n, c, h, w])])


@maker(any=1)
def triangle(g: Builder) -> None:
    x = g.pick("f", least=2)
    if g.opset < 14:
        raise RejectedError("not yet there")
    k = [g.integers(g.rng.randint(-2, 2))] if g.rng.random() < 0.6 else []
    g.add("Trilu", [x, *k], upper=g.rng.choice([0, 1]))


@maker(any=1, sequence=1)
def reverse_sequence(g: Builder) -> None:
    x = g.pick("f", least=2)
    if g.opset < 10:
        raise RejectedError("not yet there")
    time = g.rng.choice([0, 1])
    lengths = g.numbers.integers(1, x.shape[time] + 1, x.shape[1 - time])
    g.add("ReverseSequence", [x, g.integers(lengths)], time_axis=time, batch_axis=1 - time)


@maker(any=1)
def crop(g: Builder) -> None:
    x = g.pick("f", least=1)
    if g.opset < 18:
        raise RejectedError("not yet there")
    axes = sorted(a % x.array.ndim for a in axes_of(g, x.array.ndim))
    g.add("CenterCropPad", [x, g.integers([g.rng.randint(1, x.shape[a] + 3) for a in axes])],
          axes=axes)  # fmt: skip


@maker(any=1, integer=1)
def one_hot(g: Builder) -> None:
    x = g.pick("i", most=3, size=200)
    if g.opset < 11:
        raise RejectedError("negative indices mean something else")
    depth = g.rng.randint(2, 6)
    (index,) = g.add("Mod", [x, g.constant(np.asarray(depth, x.dtype))])
    values = g.constant(np.float32([-0.5, 2]))
    g.add("OneHot", [index, g.integers(depth), values], axis=axis_of(g, x.array.ndim + 1))


@maker(any=1)
def shape_of(g: Builder) -> None:
    x = g.pick("fiub", least=1)
    (shape,) = g.add("Shape", [x])
    if g.rng.random() < 0.5 and x.array.ndim > 0:
        flat = g.pick("f")
        if flat.array.size == x.array.size:
            g.add("Reshape", [flat, shape])
    elif g.opset >= 9 and g.rng.random() < 0.5:
        g.add("EyeLike", [g.pick("f", least=2, most=2)], k=g.rng.randint(-1, 1))
    else:
        g.add("Size", [x])
