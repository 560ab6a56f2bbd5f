"""Indexed reads and writes: Gather*, Scatter*, TopK."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.lowering.converters.loops import If, Kernel, Tensor
from edgepipe.lowering.converters.numeric import maximum, minimum
from edgepipe.lowering.converters.op import Expr, Op, at, axis_of, cast, const, product
from edgepipe.lowering.converters.registry import converts


def bounded(index: Any, extent: int) -> Any:
    """A run-time index with negatives wrapped, kept inside the axis: never a stray access."""
    i = cast(index, "int64")
    if isinstance(i, tirx.IntImm):
        value = int(i.value)
        return max(0, min(value + extent if value < 0 else value, extent - 1))
    wrapped = tirx.Select(i < const(0, "int64"), i + const(extent, "int64"), i)
    return tirx.max(const(0, "int64"), tirx.min(wrapped, const(extent - 1, "int64")))


@converts("Gather")
def _gather(op: Op) -> Expr:
    shape = op.shape()
    axis = axis_of(op.attr("axis", 0), len(shape))
    rank = len(op.shape(1))

    def element(index: Any, x: Any, indices: Any) -> Any:
        picked = bounded(at(indices, index[axis : axis + rank]), shape[axis])
        return x(*index[:axis], picked, *index[axis + rank :])

    return op.compute(op.out_shape(), element, op.tensor(0), op.inputs[1])


@converts("GatherElements")
def _gather_elements(op: Op) -> Expr:
    shape = op.shape()
    axis = axis_of(op.attr("axis", 0), len(shape))

    def element(index: Any, x: Any, indices: Any) -> Any:
        source = list(index)
        source[axis] = bounded(indices(*index), shape[axis])
        return x(*source)

    return op.compute(op.out_shape(), element, op.tensor(0), op.tensor(1))


@converts("GatherND")
def _gather_nd(op: Op) -> Expr:
    shape, batch = op.shape(), op.attr("batch_dims", 0)
    picked, depth = op.shape(1), op.shape(1)[-1]

    def element(index: Any, x: Any, indices: Any) -> Any:
        lead = index[: len(picked) - 1]
        source = [bounded(indices(*lead, j), shape[batch + j]) for j in range(depth)]
        return x(*index[:batch], *source, *index[len(picked) - 1 :])

    return op.compute(op.out_shape(), element, op.tensor(0), op.tensor(1))


_COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": maximum,
    "min": minimum,
}


def _combined(op: Op) -> Callable[[Any, Any], Any]:
    rule = _COMBINE[op.attr("reduction", "none")]
    if op.dtype() == "bool" and op.attr("reduction", "none") != "none":
        raise op.unsupported("reduction on bool")
    return rule


def _copy(k: Kernel, x: Tensor, y: Tensor) -> None:
    with k.each(product(x.shape)) as i:
        y.flat[i] = x.flat[i]


@converts("ScatterElements", "Scatter")
def _scatter_elements(op: Op) -> Expr:
    shape, rule = op.shape(), _combined(op)
    axis = axis_of(op.attr("axis", 0), len(shape))
    with Kernel(op, "scatter_elements", outputs=[0]) as k:
        x, indices, updates, y = k.input(0), k.input(1), k.input(2), k.output(0)
        _copy(k, x, y)
        with k.nest(*op.shape(1)) as index:
            target = list(index)
            target[axis] = bounded(indices[index], shape[axis])
            y[target] = rule(y[target], updates[index])
    return k.results[0]


@converts("ScatterND")
def _scatter_nd(op: Op) -> Expr:
    shape, rule = op.shape(), _combined(op)
    lead, depth = op.shape(1)[:-1], op.shape(1)[-1]
    with Kernel(op, "scatter_nd", outputs=[0]) as k:
        x, indices, updates, y = k.input(0), k.input(1), k.input(2), k.output(0)
        _copy(k, x, y)
        with k.nest(*lead, *shape[depth:]) as index:
            where = index[: len(lead)]
            target = [bounded(indices[[*where, j]], shape[j]) for j in range(depth)]
            target += index[len(lead) :]
            y[target] = rule(y[target], updates[index])
    return k.results[0]


@converts("TensorScatter")
def _tensor_scatter(op: Op) -> Expr:
    """Write ``update`` into a cache at a position per batch row (opset 24)."""
    shape, update = op.shape(), op.shape(1)
    axis = axis_of(op.attr("axis", -2), len(shape))
    circular = op.attr("mode", "linear") == "circular"
    with Kernel(op, "tensor_scatter", outputs=[0]) as k:
        x, new, y = k.input(0), k.input(1), k.output(0)
        _copy(k, x, y)
        with k.nest(*update) as index:
            target = list(index)
            start = k.input(2)[index[0]] if op.has(2) else const(0, "int64")
            position = cast(index[axis], "int64") + start
            if circular:
                position = tirx.floormod(position, const(shape[axis], "int64"))
            target[axis] = bounded(position, shape[axis])
            y[target] = new[index]
    return k.results[0]


@converts("TopK")
def _top_k(op: Op) -> list[Expr]:
    """Insertion into a list of the k best so far; of equal values the first index wins.

    ``sorted=0`` also returns them in order, which ONNX allows.
    """
    shape, out, _dtype = op.shape(), op.out_shape(), op.dtype()
    axis = axis_of(op.attr("axis", -1), len(shape))
    largest = bool(op.attr("largest", 1))
    count, extent = out[axis], shape[axis]
    outer, inner = product(shape[:axis]), product(shape[axis + 1 :])
    with Kernel(op, "top_k", outputs=[0, 1], inputs=op.inputs[:1]) as k:
        x, values, indices = k.input(0), k.output(0), k.output(1)
        filled, slot = k.local("int32"), k.local("int32")
        with k.nest(outer, inner) as (o, i):
            filled[0] = const(0, "int32")
            with k.each(extent) as j:
                value = x.flat[(o * extent + j) * inner + i]
                slot[0] = filled[0]
                # Both sides of And are evaluated, so the position must be valid at slot 0 too.
                above = (o * count + tirx.max(slot[0] - 1, 0)) * inner + i
                beats = value > values.flat[above] if largest else value < values.flat[above]
                with T.While(tirx.And(slot[0] > 0, beats)):
                    with If(slot[0] < count):
                        here = (o * count + slot[0]) * inner + i
                        values.flat[here] = values.flat[above]
                        indices.flat[here] = indices.flat[above]
                    slot[0] = slot[0] - 1
                with If(slot[0] < count):
                    here = (o * count + slot[0]) * inner + i
                    values.flat[here] = value
                    indices.flat[here] = cast(j, "int64")
                filled[0] = tirx.min(filled[0] + 1, count)
    return k.results
