"""Fold a Pad into the operator that follows.

1. Pad with constant zero of spatial axes → Conv: added to its ``pads``.
2. Pad with constant zero of spatial axes → AveragePool: added to its ``pads``, with
   count_include_pad=1; the pool must have no pads of its own unless it counts them already, and
   no ceil_mode.
3. Pad with the lowest value of the dtype (or -inf) of spatial axes → MaxPool: added to ``pads``
   when no window would lie wholly in the padding. Zero pads before MaxPool stay: the pool's own
   padding never wins against negative values, a zero does.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.passes.editor import Editor, array_of, is_op, shape_of


def run(edit: Editor) -> int:
    """Returns the number of Pad nodes folded into at least one reader."""
    return sum(_fold(edit, node) for node in edit.nodes("Pad"))


def _fold(edit: Editor, pad: ir.Node) -> bool:
    users = sorted({user for user, _ in pad.outputs[0].uses()}, key=lambda user: user.name or "")
    linear = [user for user in users if is_op(user, "Conv", "AveragePool", "MaxPool")]
    if not linear:
        return False
    amounts = _spatial_pads(pad)
    if isinstance(amounts, str):
        edit.note(pad.name, f"Pad not folded: {amounts}")
        return False
    count = 0
    for user in linear:
        if user.inputs[0] is not pad.outputs[0]:
            continue
        reason = _refusal(pad, user, amounts)
        if reason is not None:
            edit.note(pad.name, f"Pad not folded into {user.op_type}: {reason}")
            continue
        own = list(user.attributes.get_ints("pads", ()) or [0] * len(amounts))
        total = [a + b for a, b in zip(own, amounts, strict=True)]
        user.attributes.add(ir.AttrInt64s("pads", total))
        if user.op_type == "AveragePool":
            user.attributes.add(ir.AttrInt64("count_include_pad", 1))
        user.replace_input_with(0, pad.inputs[0])
        count += 1
    if not pad.outputs[0].uses() and not pad.outputs[0].is_graph_output():
        edit.remove(pad)
    return count > 0


def _spatial_pads(pad: ir.Node) -> list[int] | str:
    """Begin and end pads of the spatial axes, or the reason why there are none."""
    mode = pad.attributes.get_string("mode", "constant")
    if mode != "constant":
        return f"its mode is {mode}"
    pads, dims = array_of(pad.inputs[1]), shape_of(pad.inputs[0])
    if pads is None or dims is None:
        return "its pads are not constant"
    rank = len(dims)
    axes = list(range(rank))
    if len(pad.inputs) > 3 and pad.inputs[3] is not None:
        given = array_of(pad.inputs[3])
        if given is None:
            return "its axes are not constant"
        axes = [int(a) % rank for a in given]
    full = [0] * (2 * rank)
    for position, axis in enumerate(axes):
        full[axis] = int(pads[position])
        full[axis + rank] = int(pads[position + len(axes)])
    if any(full[i] for i in (0, 1, rank, rank + 1)):
        return "it pads the batch or the channels"
    if min(full) < 0:
        return "it crops"
    return full[2:rank] + full[rank + 2 :]


def _refusal(pad: ir.Node, user: ir.Node, amounts: list[int]) -> str | None:
    fill_value = pad.inputs[2] if len(pad.inputs) > 2 else None
    fill = array_of(fill_value) if fill_value is not None else np.zeros(())
    if fill is None:
        return "its value is not constant"
    fill = np.asarray(fill).reshape(())
    own = list(user.attributes.get_ints("pads", ()))
    if user.op_type != "Conv":
        kernel = user.attributes.get_ints("kernel_shape", ())
        total = [a + b for a, b in zip(own or [0] * len(amounts), amounts, strict=True)]
        if any(t >= k for t, k in zip(total, [*kernel, *kernel], strict=True)):
            return "a window would lie wholly in the padding"
    if user.op_type == "MaxPool":
        lowest = -np.inf if fill.dtype.kind == "f" else np.iinfo(fill.dtype).min
        finite_low = np.finfo(fill.dtype).min if fill.dtype.kind == "f" else lowest
        if fill not in (lowest, finite_low):
            return f"its value {fill} could win against the image"
        if len(user.outputs) > 1:
            return "its indices are read"
        return None
    if fill != 0:
        return f"its value is {fill}, not zero"
    if user.op_type == "AveragePool":
        if user.attributes.get_int("ceil_mode", 0) == 1:
            return "the pool rounds its output size up"
        if any(own) and user.attributes.get_int("count_include_pad", 0) != 1:
            return "the pool has own pads that it does not count"
    return None
