"""Recognise normalisations written out in elementary operators.

1. LayerNormalization over trailing axes: (x - mean) / sqrt(mean((x - mean)²) + epsilon), with
   division, or product with a reciprocal, or Pow by -1/2; then optional Mul by a scale and Add
   of a bias with the shape of the normalised axes (or one that broadcasts to it).
2. Softmax: exp(x - max) / sum(exp(x - max)) along one axis, with or without the maximum.
3. RMSNormalization over trailing axes: x / sqrt(mean(x²) + epsilon), in the same ways, with an
   optional Mul by a scale.
4. LogSoftmax: log of Softmax; x - log(sum(exp(x))) along one axis.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Editor, array_of, is_op, only_user, scalar_of, shape_of


def run(edit: Editor) -> int:
    """Returns the number of normalisations recognised."""
    count = 0
    for node in edit.nodes("Div", "Mul", "Log", "Sub"):
        if is_op(node, "Div", "Mul"):
            count += _layer_norm(edit, node) or _rms_norm(edit, node) or _softmax(edit, node)
        else:
            count += _log_softmax(edit, node)
    return count


def _made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if is_op(node, *op_types) else None


def _ratio(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """(numerator, denominator) in every way ``node`` can be read as a quotient."""
    left, right = node.inputs[:2]
    if left is None or right is None:
        return []
    if node.op_type == "Div":
        return [(left, right)]
    pairs = []
    for top, inverse in ((left, right), (right, left)):
        reciprocal = _made_by(inverse, "Reciprocal")
        division = _made_by(inverse, "Div")
        if reciprocal is not None and reciprocal.inputs[0] is not None:
            pairs.append((top, reciprocal.inputs[0]))
        elif division is not None and scalar_of(division.inputs[0]) == 1:
            pairs.append((top, division.inputs[1]))  # type: ignore[arg-type]
    return pairs


def _deviations(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """(centred value, variance + epsilon) in every way ``node`` can be read."""
    found = []
    for top, bottom in _ratio(node):
        root = _made_by(bottom, "Sqrt")
        power = _made_by(bottom, "Pow")
        if root is not None and root.inputs[0] is not None:
            found.append((top, root.inputs[0]))
        elif power is not None and scalar_of(power.inputs[1]) == 0.5:
            found.append((top, power.inputs[0]))  # type: ignore[arg-type]
    if node.op_type == "Mul":
        left, right = node.inputs[:2]
        for numerator, inverse in ((left, right), (right, left)):
            power = _made_by(inverse, "Pow")
            if power is not None and numerator is not None:
                spread = power.inputs[0]
                if scalar_of(power.inputs[1]) == -0.5 and spread is not None:
                    found.append((numerator, spread))
    return found


def _layer_norm(edit: Editor, node: ir.Node) -> bool:
    for centred, spread in _deviations(node):
        sub, add = _made_by(centred, "Sub"), _made_by(spread, "Add")
        if sub is None or add is None:
            continue
        variance, epsilon = add.inputs[0], scalar_of(add.inputs[1])
        mean, second = _made_by(sub.inputs[1], "ReduceMean"), _made_by(variance, "ReduceMean")
        if epsilon is None or mean is None or second is None:
            continue
        x = sub.inputs[0]
        if mean.inputs[0] is not x or not _squares(second.inputs[0], x, mean.outputs[0]):
            continue
        axes = _kept_axes(mean)
        dims = shape_of(x)
        if dims is None or axes is None or axes != _kept_axes(second):
            continue
        if axes != list(range(axes[0], len(dims))):
            edit.note(
                node.name, "LayerNormalization not recognised: the axes are not the last ones"
            )
            return False
        _become_layer_norm(edit, node, x, axes[0], epsilon)
        return True
    return False


def _rms_norm(edit: Editor, node: ir.Node) -> bool:
    for x, spread in _deviations(node):
        add = _made_by(spread, "Add")
        mean = _made_by(add.inputs[0], "ReduceMean") if add is not None else None
        epsilon = scalar_of(add.inputs[1]) if add is not None else None
        square = _made_by(mean.inputs[0], "Pow", "Mul") if mean is not None else None
        if mean is None or square is None or epsilon is None or square.inputs[0] is not x:
            continue
        exponent = square.inputs[1]
        if not (exponent is x if square.op_type == "Mul" else scalar_of(exponent) == 2):
            continue
        axes, dims = _kept_axes(mean), shape_of(x)
        if dims is None or axes is None or axes != list(range(axes[0], len(dims))):
            continue
        assert x.dtype is not None
        multiply, scale = _affine(node, "Mul", dims[axes[0] :])
        if scale is None:
            ones = np.ones(dims[axes[0] :], x.dtype.numpy())
            scale = edit.constant(ones, f"{node.name}/scale")
        attributes = {"axis": axes[0], "epsilon": epsilon}
        edit.become(multiply or node, "RMSNormalization", [x, scale], attributes)
        return True
    return False


def _squares(value: ir.Value | None, x: ir.Value | None, mean: ir.Value) -> bool:
    """Whether ``value`` is (x - mean)², written in any way."""

    def is_centred(candidate: ir.Value | None) -> bool:
        sub = _made_by(candidate, "Sub")
        return sub is not None and sub.inputs[0] is x and _same(sub.inputs[1], mean)

    power, product = _made_by(value, "Pow"), _made_by(value, "Mul")
    if power is not None:
        return scalar_of(power.inputs[1]) == 2 and is_centred(power.inputs[0])
    return product is not None and all(is_centred(v) for v in product.inputs)


def _same(a: ir.Value | None, b: ir.Value) -> bool:
    """The same value, or the same mean computed twice."""
    if a is b:
        return True
    one, two = _made_by(a, "ReduceMean"), _made_by(b, "ReduceMean")
    return (
        one is not None
        and two is not None
        and one.inputs[0] is two.inputs[0]
        and _kept_axes(one) == _kept_axes(two) is not None
    )


def _kept_axes(node: ir.Node) -> list[int] | None:
    """Sorted axes of a reduction with keepdims and constant axes, if there are any."""
    axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
    dims = shape_of(node.inputs[0])
    if axes is None or dims is None or node.attributes.get_int("keepdims", 1) != 1:
        return None
    return sorted(int(a) % len(dims) for a in axes) or None  # None of a scalar


def _become_layer_norm(
    edit: Editor, node: ir.Node, x: ir.Value | None, axis: int, epsilon: float
) -> None:
    assert x is not None and x.dtype is not None
    dims = shape_of(x) or ()
    normalised = dims[axis:]
    last = node
    multiply, scale = _affine(last, "Mul", normalised)
    last = multiply or last
    add, bias = _affine(last, "Add", normalised)
    last = add or last
    if scale is None:
        scale = edit.constant(np.ones(normalised, x.dtype.numpy()), f"{node.name}/scale")
    inputs = [x, scale] if bias is None else [x, scale, bias]
    edit.become(last, "LayerNormalization", inputs, {"axis": axis, "epsilon": epsilon})


def _affine(
    node: ir.Node, op_type: str, dims: tuple[int, ...]
) -> tuple[ir.Node | None, ir.Value | None]:
    """The only reader of ``node`` if it is ``op_type`` with a constant of shape ``dims``."""
    user = only_user(node.outputs[0])
    if user is None or not is_op(user, op_type):
        return None, None
    other = user.inputs[1] if user.inputs[0] is node.outputs[0] else user.inputs[0]
    return (
        (user, other) if array_of(other) is not None and shape_of(other) == dims else (None, None)
    )


def _softmax(edit: Editor, node: ir.Node) -> bool:
    for top, bottom in _ratio(node):
        exponential, total = _made_by(top, "Exp"), _made_by(bottom, "ReduceSum")
        if exponential is None or total is None or total.inputs[0] is not top:
            continue
        axes = _kept_axes(total)
        if axes is None or len(axes) != 1:
            continue
        x = exponential.inputs[0]
        shifted = _made_by(x, "Sub")
        if shifted is not None:
            largest = _made_by(shifted.inputs[1], "ReduceMax")
            if (
                largest is not None
                and largest.inputs[0] is shifted.inputs[0]
                and _kept_axes(largest) == axes
            ):
                x = shifted.inputs[0]
        edit.become(node, "Softmax", [x], {"axis": axes[0]})
        return True
    return False


def _log_softmax(edit: Editor, node: ir.Node) -> bool:
    if node.op_type == "Log":
        inner = _made_by(node.inputs[0], "Softmax")
        if inner is None or only_user(inner.outputs[0]) is not node:
            return False
        axis = inner.attributes.get_int("axis", -1)
        edit.become(node, "LogSoftmax", [inner.inputs[0]], {"axis": axis})
        return True
    x, right = node.inputs
    log = _made_by(right, "Log")
    total = _made_by(log.inputs[0], "ReduceSum") if log is not None else None
    whole = _made_by(right, "ReduceLogSumExp")
    if total is not None:
        exponential = _made_by(total.inputs[0], "Exp")
        if exponential is None or exponential.inputs[0] is not x:
            return False
        axes = _kept_axes(total)
    elif whole is not None and whole.inputs[0] is x:
        axes = _kept_axes(whole)
    else:
        return False
    if axes is None or len(axes) != 1:
        return False
    edit.become(node, "LogSoftmax", [x], {"axis": axes[0]})
    return True
