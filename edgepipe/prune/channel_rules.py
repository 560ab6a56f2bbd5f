"""What operators do to channels: a rule each, found by the operator's type.

A rule returns False where it does not know what a node does with its channels; they stay then.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgepipe.prune.coupling import Channels, Coupling, Slice
from edgepipe.quantization.graph import Array, constant, dims, outer_values

#: Operators that compute every element from the one at the same place.
UNARY = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round",
    "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "PRelu")
POOLS = ("AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool")
REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
#: Inputs of each, those behind the first by channel.
NORMS = {"BatchNormalization": 5, "InstanceNormalization": 3}


def couple(graph: ir.Graph) -> Coupling:
    """Which channels of a canonical graph go together."""
    coupling = Coupling()
    for node in graph:
        rule = _RULES.get(node.op_type) if node.domain == "" else None
        if rule is None or not _is_static(node) or not rule(coupling, node):
            for value in outer_values(node):
                coupling.pin(value, f"{node.op_type} '{node.name}' needs them all")
    for value in graph.outputs:
        coupling.pin(value, "they are an output of the model")
    return coupling


def _is_static(node: ir.Node) -> bool:
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    return all(dims(v) is not None for v in values)


def _channels(c: Coupling, node: ir.Node) -> Channels | None:
    """Those of the first input."""
    source = node.inputs[0]
    return None if source is None else c.of.get(source)


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    found = None if value is None else dims(value)
    assert found is not None, "rules see static shapes only"
    return found


Rule = Callable[[Coupling, ir.Node], bool]


def _constant(node: ir.Node, index: int) -> Array | None:
    return constant(node.inputs[index]) if len(node.inputs) > index else None


def _has(node: ir.Node, index: int) -> bool:
    return len(node.inputs) > index and node.inputs[index] is not None


def _conv(c: Coupling, node: ir.Node) -> bool:
    weight, x = _constant(node, 1), _channels(c, node)
    bias_is_known = not _has(node, 2) or _constant(node, 2) is not None
    if weight is None or (x is not None and x.axis != 1) or not bias_is_known:
        return False
    groups, transposed = node.attributes.get_int("group", 1), node.op_type == "ConvTranspose"
    channels = _shape(node.inputs[0])[1]
    outputs = _shape(node.outputs[0])[1]
    if groups > 1 and transposed:
        return False
    if groups == channels > 1:
        if x is None:
            return True
        ids = np.repeat(x.ids, outputs // channels)
        c.of[node.outputs[0]] = Channels(1, ids)
        c.depthwise.append((node, x.ids))
    else:
        ids = c.make(node, 1, outputs)
        for joined in [ids] if x is None else [ids, x.ids]:
            for group in joined.reshape(groups, -1)[1:]:
                c.join(joined.reshape(groups, -1)[0], group)
        if x is not None:
            c.readers.append((node, x.ids))
            c.cut(node, 1, 0 if transposed else 1, x.ids.reshape(groups, -1)[0])
    c.cut(node, 1, 1 if transposed else 0, ids)
    if _has(node, 2):
        c.cut(node, 2, 0, ids)
    return True


def _dense(c: Coupling, node: ir.Node) -> bool:
    weight, x = _constant(node, 1), _channels(c, node)
    bias = _constant(node, 2)
    if weight is None or weight.ndim != 2 or node.attributes.get_int("transA", 0) == 1:
        return False
    if _has(node, 2) and bias is None:
        return False
    rank = len(_shape(node.outputs[0]))
    if x is not None and x.axis != len(_shape(node.inputs[0])) - 1:
        return False
    turned = node.attributes.get_int("transB", 0) == 1
    ids = c.make(node, rank - 1, weight.shape[0 if turned else 1])
    c.cut(node, 1, 0 if turned else 1, ids)
    if x is not None:
        c.readers.append((node, x.ids))
        c.cut(node, 1, 1 if turned else 0, x.ids)
    if bias is not None and bias.size > 1:
        c.cut(node, 2, bias.ndim - 1, ids)
    return True


def _unary(c: Coupling, node: ir.Node) -> bool:
    x = _channels(c, node)
    if x is not None:
        c.of[node.outputs[0]] = x
    return len(node.outputs) == 1


def _spatial(c: Coupling, node: ir.Node) -> bool:
    x = _channels(c, node)
    return (x is None or x.axis == 1) and _unary(c, node)


def _binary(c: Coupling, node: ir.Node) -> bool:
    rank = len(_shape(node.outputs[0]))
    known = [(i, v, _shape(v)) for i, v in enumerate(node.inputs) if v is not None]
    places = {c.of[v].axis - len(d) for _, v, d in known if v in c.of}
    if not places:
        return True
    if len(places) > 1:
        return False
    place = places.pop()
    extent = _shape(node.outputs[0])[rank + place]
    ids: Array | None = None
    for _, value, shape in known:
        if value in c.of and len(shape) >= -place and shape[place] == extent:
            if ids is None:
                ids = c.of[value].ids
            else:
                c.join(ids, c.of[value].ids)
    if ids is None:  # one channel, spread over those of a constant
        return False
    for index, value, shape in known:
        if len(shape) < -place or shape[place] == 1 < extent:
            c.pin(value, f"{node.op_type} '{node.name}' spreads it over channels")
        elif value not in c.of:
            if constant(value) is None:
                return False
            c.cut(node, index, len(shape) + place, ids)
    c.of[node.outputs[0]] = Channels(rank + place, ids)
    return True


def _concat(c: Coupling, node: ir.Node) -> bool:
    found = [None if v is None else c.of.get(v) for v in node.inputs]
    tracked = [x for x in found if x is not None]
    if not tracked:
        return True
    shape = _shape(node.outputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    if len({x.axis for x in tracked}) > 1:
        return False
    if axis != tracked[0].axis:
        if len(tracked) < len(found):
            return False
        for other in tracked[1:]:
            c.join(tracked[0].ids, other.ids)
        c.of[node.outputs[0]] = tracked[0]
        return True
    parts = []
    for value, x in zip(node.inputs, found, strict=True):
        if x is None:
            ids = c.fresh(_shape(value)[axis])
            c.pins.update((int(i), "they are no layer's") for i in ids)
        parts.append(ids if x is None else x.ids)
    c.of[node.outputs[0]] = Channels(axis, np.concatenate(parts))
    return True


def _reduce(c: Coupling, node: ir.Node) -> bool:
    x, axes = _channels(c, node), _constant(node, 1)
    if x is None:
        return True
    rank = len(_shape(node.inputs[0]))
    if axes is None or not axes.size or x.axis in (gone := {int(a) % rank for a in axes}):
        return False
    kept = node.attributes.get_int("keepdims", 1)
    c.of[node.outputs[0]] = Channels(x.axis - (0 if kept else sum(a < x.axis for a in gone)), x.ids)
    return True


def _reshape(c: Coupling, node: ir.Node) -> bool:
    """The elements move in order; their classes show where the channels went."""
    x = _channels(c, node)
    if x is None:
        return True
    shape, result = _shape(node.inputs[0]), _shape(node.outputs[0])
    wide = x.ids.reshape([-1 if a == x.axis else 1 for a in range(len(shape))])
    spread = np.broadcast_to(wide, shape).reshape(result)
    for axis, extent in enumerate(result):
        rows = np.moveaxis(spread, axis, 0).reshape(extent, -1)
        if extent > 1 and (rows == rows[:, :1]).all():
            c.of[node.outputs[0]] = Channels(axis, rows[:, 0].copy())
            if node.op_type == "Reshape":
                wanted = _constant(node, 1)
                if wanted is None:
                    return False
                if wanted[axis] > 0:
                    c.extents.append(Slice(node, 1, axis, rows[:, 0].copy()))
            return True
    return False


def _transpose(c: Coupling, node: ir.Node) -> bool:
    x = _channels(c, node)
    if x is None:
        return True
    rank = len(_shape(node.inputs[0]))
    order = list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
    c.of[node.outputs[0]] = Channels(order.index(x.axis), x.ids)
    return True


def _pad(c: Coupling, node: ir.Node) -> bool:
    x, pads = _channels(c, node), _constant(node, 1)
    if x is None:
        return True
    rank = len(_shape(node.inputs[0]))
    if _has(node, 3) or pads is None or pads[x.axis] or pads[rank + x.axis]:
        return False
    return _unary(c, node)


def _resize(c: Coupling, node: ir.Node) -> bool:
    x = _channels(c, node)
    if x is None:
        return True
    extent = _shape(node.inputs[0])[x.axis]
    if "axes" in node.attributes or _shape(node.outputs[0])[x.axis] != extent:
        return False
    sizes = _constant(node, 3)
    if _has(node, 3):
        if sizes is None:
            return False
        c.extents.append(Slice(node, 3, x.axis, x.ids))
    return _unary(c, node)


def _norm(c: Coupling, node: ir.Node) -> bool:
    x = _channels(c, node)
    if x is None:
        return True
    count = NORMS[node.op_type]
    if x.axis != 1 or any(_constant(node, i) is None for i in range(1, count)):
        return False
    for index in range(1, count):
        c.cut(node, index, 0, x.ids)
    return _unary(c, node)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, _unary),
    **dict.fromkeys(BINARY, _binary),
    **dict.fromkeys(POOLS, _spatial),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(NORMS, _norm),
    "Conv": _conv, "ConvTranspose": _conv, "Gemm": _dense, "MatMul": _dense, "Concat": _concat,
    "Transpose": _transpose, "Pad": _pad, "Resize": _resize,
}  # fmt: skip
