"""Own decompositions of arithmetic and data-movement operators.

1. MeanVarianceNormalization → means, with a constant epsilon as in the standard's function.
2. LpNormalization → ReduceL1 or ReduceL2 and a division that gives 0 for a zero norm.
3. CumProd → log2(n) multiplications with shifted copies (Hillis and Steele's scan).
4. TensorScatter → ScatterElements with computed indices.
5. BitShift by an amount that may reach the width, or of signed integers → shifts of unsigned
   integers by less than the width.
6. Mod of floats with fmod=0 → Mod with fmod=1 and a correction of the sign.
7. SpaceToDepth with mode CRD → Reshape, Transpose, Reshape.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.decompose import rewrites
from edgepipe.passes.editor import Array, Editor, array_of, shape_of


def like(edit: Editor, value: float | Array, reference: ir.Value | None) -> ir.Value:
    """A constant of the dtype of ``reference``."""
    assert reference is not None and reference.dtype is not None
    return edit.constant(np.asarray(value).astype(reference.dtype.numpy()))


def ints(edit: Editor, values: list[int] | tuple[int, ...]) -> ir.Value:
    """An int64 vector constant."""
    return edit.constant(np.array(values, np.int64))


@rewrites("MeanVarianceNormalization")
def mean_variance(edit: Editor, node: ir.Node) -> bool:
    """Case 1."""
    x = node.inputs[0]
    axes = ints(edit, tuple(node.attributes.get_ints("axes", (0, 2, 3))))
    mean = edit.insert(node, "ReduceMean", [x, axes])
    centred = edit.insert(node, "Sub", [x, mean])
    square = edit.insert(node, "Mul", [centred, centred])
    variance = edit.insert(node, "ReduceMean", [square, axes])
    deviation = edit.insert(node, "Sqrt", [variance])
    edit.become(
        node,
        "Div",
        [centred, edit.insert(node, "Add", [deviation, like(edit, 1e-9, x)])],
    )
    return True


@rewrites("LpNormalization")
def lp_normalization(edit: Editor, node: ir.Node) -> bool:
    """Case 2."""
    x = node.inputs[0]
    axes = ints(edit, [node.attributes.get_int("axis", -1)])
    op = "ReduceL1" if node.attributes.get_int("p", 2) == 1 else "ReduceL2"
    norm = edit.insert(node, op, [x, axes], {"keepdims": 1})
    zero = edit.insert(node, "Equal", [norm, like(edit, 0, x)])
    safe = edit.insert(node, "Where", [zero, like(edit, 1, x), norm])
    edit.become(node, "Div", [x, safe])
    return True


@rewrites("CumProd")
def cumulative_product(edit: Editor, node: ir.Node) -> bool:
    """Case 3."""
    x, axis_value = node.inputs[0], array_of(node.inputs[1])
    dims = shape_of(x)
    if dims is None or axis_value is None:
        edit.note(node.name, "CumProd kept: its axis or shape is not known")
        return False
    axis = int(axis_value.reshape(()) % len(dims))
    reverse = bool(node.attributes.get_int("reverse", 0))
    value = x
    if node.attributes.get_int("exclusive", 0):
        value = _shifted(edit, node, value, axis, 1, dims, reverse)
    step = 1
    while step < dims[axis]:
        moved = _shifted(edit, node, value, axis, step, dims, reverse)
        value = edit.insert(node, "Mul", [value, moved])
        step *= 2
    edit.become(node, "Identity", [value])
    return True


def _shifted(
    edit: Editor,
    node: ir.Node,
    value: ir.Value | None,
    axis: int,
    step: int,
    dims: tuple[int, ...],
    reverse: bool,
) -> ir.Value:
    """``value`` moved by ``step`` along ``axis``, ones moving in."""
    rank = len(dims)
    pads = [0] * (2 * rank)
    pads[axis + rank if reverse else axis] = step
    padded = edit.insert(node, "Pad", [value, ints(edit, pads), like(edit, 1, value)])
    start = step if reverse else 0
    span = [ints(edit, [n]) for n in (start, start + dims[axis], axis)]
    return edit.insert(node, "Slice", [padded, *span])


@rewrites("TensorScatter")
def tensor_scatter(edit: Editor, node: ir.Node) -> bool:
    """Case 4. Shapes: cache [B, …, T, …], update [B, …, L, …], write_indices [B]."""
    cache, update = node.inputs[:2]
    where = node.inputs[2] if len(node.inputs) > 2 else None
    cache_dims, dims = shape_of(cache), shape_of(update)
    if cache_dims is None or dims is None:
        edit.note(node.name, "TensorScatter kept: its shapes are not static")
        return False
    axis = node.attributes.get_int("axis", -2) % len(dims)
    along = [1] * len(dims)
    along[axis] = dims[axis]
    index = edit.constant(np.arange(dims[axis], dtype=np.int64).reshape(along))
    if where is not None:
        batch = [dims[0]] + [1] * (len(dims) - 1)
        start = edit.insert(node, "Reshape", [where, ints(edit, batch)])
        index = edit.insert(node, "Add", [start, index])
    if node.attributes.get_string("mode", "linear") == "circular":
        index = edit.insert(node, "Mod", [index, edit.constant(np.array(cache_dims[axis]))])
    index = edit.insert(node, "Expand", [index, ints(edit, dims)])
    edit.become(node, "ScatterElements", [cache, index, update], {"axis": axis})
    return True


@rewrites("BitShift")
def bit_shift(edit: Editor, node: ir.Node) -> bool:
    """Case 5."""
    x, amount = node.inputs
    assert x is not None and amount is not None and x.dtype is not None
    width, signed = int(x.dtype.itemsize * 8), x.dtype.is_signed()
    known = array_of(amount)
    bounded = known is not None and bool((known < width).all())
    if not signed and (bounded or node.meta.get("bounded")):
        return False
    right = node.attributes.get_string("direction", "") == "RIGHT"
    unsigned = {8: ir.DataType.UINT8, 16: ir.DataType.UINT16, 32: ir.DataType.UINT32}.get(
        width, ir.DataType.UINT64
    )
    to_unsigned, back = {"to": int(unsigned)}, {"to": int(x.dtype)}
    inside = edit.insert(node, "Less", [amount, like(edit, width, amount)])
    if signed:
        positive = edit.insert(node, "GreaterOrEqual", [amount, like(edit, 0, amount)])
        inside = edit.insert(node, "And", [inside, positive])
    count = edit.insert(node, "Where", [inside, amount, like(edit, 0, amount)])
    value, negative = x, None
    if signed and right:
        negative = edit.insert(node, "Less", [x, like(edit, 0, x)])
        flipped = edit.insert(node, "BitwiseNot", [x])
        value = edit.insert(node, "Where", [negative, flipped, x])
    if signed:
        value = edit.insert(node, "Cast", [value], to_unsigned)
        count = edit.insert(node, "Cast", [count], to_unsigned)
    direction = {"direction": "RIGHT" if right else "LEFT"}
    inner = edit.insert_node(node, "BitShift", [value, count], direction)
    inner.meta["bounded"] = True  # the count is below the width: not to be rewritten again
    shifted = inner.outputs[0]
    if signed:
        shifted = edit.insert(node, "Cast", [shifted], back)
    result = edit.insert(node, "Where", [inside, shifted, like(edit, 0, x)])
    if negative is not None:
        restored = edit.insert(node, "BitwiseNot", [result])
        result = edit.insert(node, "Where", [negative, restored, result])
    edit.become(node, "Identity", [result])
    return True


@rewrites("Mod")
def float_mod(edit: Editor, node: ir.Node) -> bool:
    """Case 6."""
    a, b = node.inputs
    assert a is not None and a.dtype is not None
    if not a.dtype.is_floating_point() or node.attributes.get_int("fmod", 0) == 1:
        return False
    rest = edit.insert(node, "Mod", [a, b], {"fmod": 1})
    zero = like(edit, 0, a)
    below = edit.insert(node, "Less", [rest, zero])
    divisor_below = edit.insert(node, "Less", [b, zero])
    differs = edit.insert(node, "Xor", [below, divisor_below])
    nonzero = edit.insert(node, "Not", [edit.insert(node, "Equal", [rest, zero])])
    adjust = edit.insert(node, "And", [differs, nonzero])
    moved = edit.insert(node, "Add", [rest, b])
    edit.become(node, "Where", [adjust, moved, rest])
    return True


def space_to_depth_crd(edit: Editor, node: ir.Node) -> bool:
    """Case 7: [N, C, H, W] → [N, C·b², H/b, W/b] with the channel outermost."""
    dims, block = shape_of(node.inputs[0]), node.attributes["blocksize"].as_int()
    if dims is None:
        return False
    n, c, h, w = dims
    split = ints(edit, [n, c, h // block, block, w // block, block])
    value = edit.insert(node, "Reshape", [node.inputs[0], split])
    value = edit.insert(node, "Transpose", [value], {"perm": [0, 1, 3, 5, 2, 4]})
    target = ints(edit, [n, c * block * block, h // block, w // block])
    edit.become(node, "Reshape", [value, target])
    return True


__all__ = ["Array", "ints", "like", "space_to_depth_crd"]
