"""Integer forms of operators between Q/DQ pairs: the rules of the interpreter, on descriptions.

1. Conv, ConvTranspose, Gemm, MatMul of codes and constant weights, and MatMul of two tensors of
   codes: a product. An Add of a bias with the product's own scale joins its accumulator.
2. Add and Sub gather terms. Relu and Clip cut what is not rounded yet.
3. Averages: the sum of the codes, the count in the scale. A bilinear Resize: between the codes.
4. Movement and MaxPool: the operator itself, on codes.
5. Mul of two tensors of codes: the product of their integers; by a positive constant: the scales.
6. A function of one tensor of codes is a table of all codes; so is a Mul of codes with a table of
   the same codes (SiLU and the like).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgepipe.lowering.integers.terms import Codes, Sum, Term, Weights
from edgepipe.quantization import integer_movement, interpreter, linear_resize
from edgepipe.quantization.float_node import FloatNodes
from edgepipe.quantization.graph import Array, bounds, constant, dims, is_op
from edgepipe.quantization.placement import AVERAGES, MOVEMENT, TABLES

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: Codes of an 8-bit type, in the order of tables.
LOWEST = {ir.DataType.INT8: -128, ir.DataType.UINT8: 0}

Operand = Sum | Weights | None


def combine(node: ir.Node, operands: list[Operand]) -> Sum | None:
    """The result of an arithmetic node, or None where it has no integer form."""
    first = operands[0] if operands else None
    second = operands[1] if len(operands) > 1 else None
    if not isinstance(first, Sum):
        if is_op(node, "Add") and isinstance(second, Sum) and isinstance(first, Weights):
            return _named(node, _biased(second, first), second)
        return None
    if (limits := bounds(node)) is not None:
        cut = replace(first, low=max(first.low, limits[0]), high=min(first.high, limits[1]))
        return _named(node, cut, first)
    if is_op(node, *LINEAR):
        return _named(node, _linear(node, first, operands), first)
    if is_op(node, *AVERAGES):
        return _named(node, _average(node, first), first)
    if linear_resize.unfit(node) is None and (codes := first.codes) is not None:
        return _named(node, Sum((Term("resize", (codes,), codes.scale, node),)), first)
    if is_op(node, "Add") and isinstance(second, Weights):
        return _named(node, _biased(first, second), first)
    if is_op(node, "Add", "Sub") and isinstance(second, Sum):
        return _named(node, _added(node, first, second), first, second)
    if (factor := interpreter.scalar_factor(node)) is not None:
        return _named(node, _scaled(first, factor), first)
    if is_op(node, "Mul") and isinstance(second, Sum):
        return _named(node, _multiplied(node, first, second))
    if is_op(node, *TABLES):
        return _named(node, _table(node, first))
    return None


def moves(node: ir.Node, operands: list[Operand]) -> list[Codes] | None:
    """The tensors of codes that a movement operator moves, or None where it has to see floats."""
    if not is_op(node, *MOVEMENT) or (is_op(node, "MaxPool") and len(node.outputs) > 1):
        return None
    if is_op(node, "Resize") and node.attributes.get_string("mode", "nearest") != "nearest":
        return None
    if is_op(node, "Pad") and not _pads_zero(node):
        return None
    data = operands if is_op(node, "Concat") else operands[:1]
    found = [x.codes if isinstance(x, Sum) else None for x in data]
    codes = [c for c in found if c is not None]
    if len(codes) < len(found) or not codes:
        return None
    same = all(c.same_grid(codes[0].scale, codes[0].zero) for c in codes)
    return codes if same else None


def _named(node: ir.Node, result: Sum | None, *sources: Sum) -> Sum | None:
    if result is None:
        return None
    names = tuple(dict.fromkeys(n for s in sources for n in s.names))
    return replace(result, names=(*names, node.name or node.op_type))


def _pads_zero(node: ir.Node) -> bool:
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    array = constant(fill)
    return fill is None or (array is not None and float(array.reshape(())) == 0.0)


def _linear(node: ir.Node, x: Sum, operands: list[Operand]) -> Sum | None:
    codes, weights = x.codes, operands[1]
    bias = operands[2] if len(operands) > 2 else None
    has_bias = len(node.inputs) > 2 and node.inputs[2] is not None
    if codes is None or (has_bias and not isinstance(bias, Weights)):
        return None
    if isinstance(weights, Sum):
        other = weights.codes
        if other is None or not is_op(node, "MatMul"):
            return None
        scale = np.asarray(codes.scale * other.scale, np.float32)
        return Sum((Term("product", (codes, other), scale, node),))
    if weights is None:
        return None
    held = bias.codes if isinstance(bias, Weights) else None
    scale = product_scale(node, np.asarray(codes.scale * weights.scale, np.float32))
    return Sum((Term("product", (codes,), scale, node, weights, held),))


def product_scale(node: ir.Node, scale: Array) -> Array:
    """Input scale × weight scale, shaped to broadcast against the node's result."""
    if is_op(node, "ConvTranspose"):
        scale = np.tile(scale.reshape(-1), node.attributes.get_int("group", 1))
    if scale.size == 1:
        return scale.reshape(())
    shape = dims(node.outputs[0])
    assert shape is not None
    convolution = is_op(node, "Conv", "ConvTranspose")
    return scale.reshape((1, -1, *(1,) * (len(shape) - 2)) if convolution else (-1,))


def _biased(x: Sum, bias: Weights) -> Sum | None:
    """A constant addend that the accumulator of a product can take."""
    term = x.terms[0]
    if len(x.terms) > 1 or x.cut or term.kind != "product" or term.bias is not None:
        return None
    vector = bias.codes.ndim == 1 and term.node is not None and is_op(term.node, "MatMul", "Gemm")
    if not vector or not interpreter.same_scale(term.scale, bias.scale):
        return None
    return Sum((replace(term, bias=bias.codes),))


def _average(node: ir.Node, x: Sum) -> Sum | None:
    term, codes = x.single, x.codes
    source = node.inputs[0]
    if term is None or codes is None or source is None:
        return None
    shape = dims(source)
    assert shape is not None
    # The interpreter knows the counts; it is asked with a tensor of zeros.
    extra = [constant(v) for v in node.inputs[1:]]
    asked = interpreter.Term(np.zeros(shape, np.int32), codes.scale)
    found = integer_movement.move(node, asked, [None, *extra])
    assert found is not None
    return Sum((Term("average", (codes,), np.asarray(found[0].terms[0].scale), node),))


def _added(node: ir.Node, first: Sum, second: Sum) -> Sum | None:
    if first.cut or second.cut:
        return None
    if is_op(node, "Sub"):
        if first.single is None or second.single is None:
            return None
        negative = replace(second.terms[0], scale=-second.terms[0].scale)
        return Sum((first.terms[0], negative))
    return Sum(first.terms + second.terms)


def _scaled(x: Sum, factor: Array) -> Sum:
    terms = []
    for term in x.terms:
        scale = np.asarray(term.scale * factor, np.float32)
        inputs = term.inputs
        if term.kind == "codes":
            inputs = (replace(inputs[0], scale=scale),)
        terms.append(replace(term, scale=scale, inputs=inputs))
    return Sum(tuple(terms), float(x.low * factor), float(x.high * factor))


def _multiplied(node: ir.Node, first: Sum, second: Sum) -> Sum | None:
    a, b = first.codes, second.codes
    if a is None or b is None:
        return None
    scale = np.asarray(a.scale * b.scale, np.float32)
    for one, other in ((a, b), (b, a)):
        known = table_of(other)
        if known is not None and known[0].value is one.value:
            integers = (_all(one) - one.zero) * (known[1].astype(np.int32) - other.zero)
            return Sum((Term("table", (one,), scale, node, table=integers),))
    return Sum((Term("multiply", (a, b), scale, node),))


#: ``ir.Value.meta`` key of codes that are a table's results: (the codes looked up, the table).
TABLE = "edgepipe.table"


def table_of(codes: Codes) -> tuple[Codes, Array] | None:
    """Where ``codes`` come from a table: the codes it is looked up with, and the table [256]."""
    return codes.value.meta.get(TABLE)


_float_nodes = FloatNodes()


def _table(node: ir.Node, x: Sum) -> Sum | None:
    codes = x.codes
    if codes is None:
        return None
    values = (_all(codes) - codes.zero).astype(np.float32) * codes.scale
    extra = [constant(v) for v in node.inputs[1:]]
    found = _float_nodes.run(node, [values, *extra])[0]
    return Sum((Term("table", (codes,), np.ones((), np.float32), node, table=found),))


def _all(codes: Codes) -> Array:
    """Every code of the tensor's type, ascending, int32 [256]."""
    assert codes.value.dtype is not None
    lowest = LOWEST[codes.value.dtype]
    return np.arange(lowest, lowest + 256, dtype=np.int32)
