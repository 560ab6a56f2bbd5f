"""Own decomposition of Attention (opset 23 to 25) into MatMul, Softmax and masks.

Source: the operator's definition in the ONNX standard. Cases:

1. Inputs of rank 3 [batch, sequence, heads·size] are split into heads and merged again.
2. Grouped queries: the queries of one key head are stacked along the sequence, so keys and
   values are never repeated.
3. Past keys and values are concatenated in front; present ones are outputs.
4. Boolean and float masks, shorter masks, causal and window masks (constants wherever the
   offset is one), ``nonpad_kv_seqlen``.
5. Softcap before the mask; ``qk_matmul_output`` in its four modes; ``softmax_precision``.
6. Query rows with every key masked give zero, not NaN; the guard is left out where constant
   masks show that there is no such row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError
from edgepipe.passes.decompose import rewrites
from edgepipe.passes.editor import Array, Editor, array_of, shape_of
from edgepipe.passes.rewrite_math import ints, like


@dataclass
class _Heads:
    """Static sizes: batch, query and key heads, query and key lengths, head sizes of q·k and v."""

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    size: int
    v_size: int


@rewrites("Attention")
def attention(edit: Editor, node: ir.Node) -> bool:
    """Replace one Attention node."""
    inputs = [*node.inputs, *[None] * (7 - len(node.inputs))]
    if any(value is not None and shape_of(value) is None for value in inputs):
        edit.note(node.name, "Attention kept: its shapes are not static")
        return False
    q, k, v, mask, past_k, past_v, valid = inputs
    attributes = node.attributes
    rank = len(shape_of(q) or ())
    q = _split_heads(edit, node, q, attributes.get_int("q_num_heads", 0))
    k, v = (_split_heads(edit, node, x, attributes.get_int("kv_num_heads", 0)) for x in (k, v))
    past = 0
    if past_k is not None and past_v is not None:
        past = (shape_of(past_k) or (0, 0, 0))[2]
        k = edit.insert(node, "Concat", [past_k, k], {"axis": 2})
        v = edit.insert(node, "Concat", [past_v, v], {"axis": 2})
    q_dims, k_dims, v_dims = (shape_of(x) or () for x in (q, k, v))
    h = _Heads(q_dims[0], q_dims[1], k_dims[1], q_dims[2], k_dims[2], q_dims[3], v_dims[3])

    scores = _scores(edit, node, q, k, h)
    debug = [scores]
    softcap = attributes.get_float("softcap", 0.0)
    if softcap > 0:
        inner = edit.insert(node, "Div", [scores, like(edit, softcap, q)])
        inner = edit.insert(node, "Tanh", [inner])
        scores = edit.insert(node, "Mul", [inner, like(edit, softcap, q)])
    debug.append(scores)
    bias = _bias(edit, node, q, mask, valid, past, h)
    if bias is not None:
        scores = edit.insert(node, "Add", [scores, bias])
    debug.append(scores)
    weights = _softmax(edit, node, scores)
    mode = attributes.get_int("qk_matmul_output_mode", 0)
    if not 0 <= mode <= 3:
        raise UserError(f"qk_matmul_output_mode is {mode}, not 0 to 3", where=f"node '{node.name}'")
    outputs = [*node.outputs, *[None] * (4 - len(node.outputs))]
    masked = _masked_rows(edit, node, bias)
    wanted = outputs[3] is not None and _is_read(outputs[3])
    if masked is not None and mode == 3 and wanted:
        weights = edit.insert(node, "Where", [masked, like(edit, 0, weights), weights])
    debug.append(weights)
    y = _weighted(edit, node, weights, v, h)
    if masked is not None:
        y = edit.insert(node, "Where", [masked, like(edit, 0, y), y])
    if rank == 3:
        y = edit.insert(node, "Transpose", [y], {"perm": [0, 2, 1, 3]})
        merged = ints(edit, [h.batch, h.q_len, h.q_heads * h.v_size])
        y = edit.insert(node, "Reshape", [y, merged])
    for old, new in zip(outputs, (y, k, v, debug[mode]), strict=True):
        if old is not None and _is_read(old):
            edit.forward(old, new)
    edit.remove(node)
    return True


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _split_heads(edit: Editor, node: ir.Node, value: ir.Value | None, heads: int) -> ir.Value:
    """[batch, sequence, heads·size] → [batch, heads, sequence, size]; rank 4 as it is."""
    assert value is not None
    dims = shape_of(value) or ()
    if len(dims) == 4:
        return value
    split = ints(edit, [dims[0], dims[1], heads, dims[2] // heads])
    value = edit.insert(node, "Reshape", [value, split])
    return edit.insert(node, "Transpose", [value], {"perm": [0, 2, 1, 3]})


def _scores(edit: Editor, node: ir.Node, q: ir.Value, k: ir.Value, h: _Heads) -> ir.Value:
    """scale · q · kᵀ as [batch, q heads, q length, kv length]."""
    scale = node.attributes.get_float("scale", 0.0) or 1 / math.sqrt(h.size)
    q = edit.insert(node, "Mul", [q, like(edit, scale, q)])
    if h.q_heads != h.kv_heads:
        stacked = [h.batch, h.kv_heads, h.q_heads // h.kv_heads * h.q_len, h.size]
        q = edit.insert(node, "Reshape", [q, ints(edit, stacked)])
    k = edit.insert(node, "Transpose", [k], {"perm": [0, 1, 3, 2]})
    scores = edit.insert(node, "MatMul", [q, k])
    if h.q_heads != h.kv_heads:
        full = ints(edit, [h.batch, h.q_heads, h.q_len, h.kv_len])
        scores = edit.insert(node, "Reshape", [scores, full])
    return scores


def _weighted(edit: Editor, node: ir.Node, weights: ir.Value, v: ir.Value, h: _Heads) -> ir.Value:
    """weights · v as [batch, q heads, q length, v size]."""
    if h.q_heads == h.kv_heads:
        return edit.insert(node, "MatMul", [weights, v])
    stacked = [h.batch, h.kv_heads, h.q_heads // h.kv_heads * h.q_len, h.kv_len]
    weights = edit.insert(node, "Reshape", [weights, ints(edit, stacked)])
    y = edit.insert(node, "MatMul", [weights, v])
    full = ints(edit, [h.batch, h.q_heads, h.q_len, h.v_size])
    return edit.insert(node, "Reshape", [y, full])


def _softmax(edit: Editor, node: ir.Node, scores: ir.Value) -> ir.Value:
    precision = node.attributes.get_int("softmax_precision", 0)
    own = scores.dtype
    assert own is not None
    if precision in (0, int(own)):
        return edit.insert(node, "Softmax", [scores], {"axis": -1})
    scores = edit.insert(node, "Cast", [scores], {"to": precision})
    weights = edit.insert(node, "Softmax", [scores], {"axis": -1})
    return edit.insert(node, "Cast", [weights], {"to": int(own)})


def _bias(
    edit: Editor,
    node: ir.Node,
    q: ir.Value,
    mask: ir.Value | None,
    valid: ir.Value | None,
    past: int,
    h: _Heads,
) -> ir.Value | None:
    """What is added to the scores: 0 or -inf by the masks, and the float mask."""
    allowed = _positions(edit, node, valid, past, h)
    floating = None
    if mask is not None:
        mask = _padded(edit, node, mask, h.kv_len)
        if mask.dtype == ir.DataType.BOOL:
            allowed.append(mask)
        else:
            floating = mask
    if not allowed:
        return floating
    total = allowed[0]
    for value in allowed[1:]:
        total = edit.insert(node, "And", [total, value])
    known = array_of(total)
    if known is not None:
        blocked = np.where(known, 0, -np.inf)
        bias = like(edit, blocked, q)
    else:
        bias = edit.insert(node, "Where", [total, like(edit, 0, q), like(edit, -np.inf, q)])
    return bias if floating is None else edit.insert(node, "Add", [bias, floating])


def _positions(
    edit: Editor, node: ir.Node, valid: ir.Value | None, past: int, h: _Heads
) -> list[ir.Value]:
    """Boolean masks from causality, windows and the number of valid keys."""
    key = np.arange(h.kv_len)
    ahead: Array = key[None, :] - np.arange(h.q_len)[:, None]  # key - query, [q, kv]
    bounds = []
    if node.attributes.get_int("is_causal", 0):
        bounds.append(("LessOrEqual", 0))
    right = node.attributes.get_int("right_window_size", -1)
    left = node.attributes.get_int("left_window_size", -1)
    if right >= 0:
        bounds.append(("LessOrEqual", right))
    if left >= 0:
        bounds.append(("GreaterOrEqual", -left))
    if valid is None:
        result = np.ones(ahead.shape, bool)
        for op, bound in bounds:
            limit = bound + past
            result &= ahead <= limit if op == "LessOrEqual" else ahead >= limit
        return [edit.constant(result, "allowed")] if bounds else []
    count = edit.insert(node, "Reshape", [valid, ints(edit, [h.batch, 1, 1, 1])])
    found = [edit.insert(node, "Less", [edit.constant(key, "keys"), count])]
    offset = edit.insert(node, "Sub", [count, like(edit, h.q_len, count)])
    for op, bound in bounds:
        limit_value = edit.insert(node, "Add", [offset, like(edit, bound, count)])
        found.append(edit.insert(node, op, [edit.constant(ahead, "ahead"), limit_value]))
    return found


def _padded(edit: Editor, node: ir.Node, mask: ir.Value, kv_len: int) -> ir.Value:
    """A mask shorter than the keys, extended by masked positions."""
    dims = shape_of(mask)
    if not dims:
        raise UserError("the mask has no dimension of keys", where=f"node '{node.name}'",
                        fix="export the model again")  # fmt: skip
    missing = kv_len - dims[-1]
    if missing <= 0:
        return mask
    fill = 0 if mask.dtype == ir.DataType.BOOL else -np.inf
    tail = like(edit, np.full((*dims[:-1], missing), fill), mask)
    return edit.insert(node, "Concat", [mask, tail], {"axis": len(dims) - 1})


def _masked_rows(edit: Editor, node: ir.Node, bias: ir.Value | None) -> ir.Value | None:
    """Which query rows may attend to nothing, as a boolean [..., q, 1]; None where none can."""
    if bias is None:
        return None
    known = array_of(bias)
    if known is not None and not np.isneginf(known.max(axis=-1)).any():
        return None
    best = edit.insert(node, "ReduceMax", [bias, ints(edit, [-1])], {"keepdims": 1})
    return edit.insert(node, "Equal", [best, like(edit, -np.inf, bias)])
