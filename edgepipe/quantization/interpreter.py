"""The quantized graph in integers, in NumPy: what every kernel must compute, bit for bit.

A Q/DQ graph says *float operators between roundings*; here each operator between a
DequantizeLinear and a QuantizeLinear is computed on the codes instead:
1. Products (Conv, ConvTranspose, Gemm, MatMul): int32 sum of (code − zero point) × weight code,
   plus the int32 bias. The value it stands for is that sum times sx·sw per output channel.
2. Averages: int32 sum of (code − zero point); its scale is sx / count.
3. Requantisation to scale sy: y = saturate(round(acc · m) + zy) with m = float32(float32(sx·sw) /
   sy), one float32 multiply, round half to even. A fused Relu or Clip bounds y by the codes of
   its bounds.
4. An Add gathers terms: round(acc₁ · m₁ + acc₂ · m₂), each product rounded to float32, then the
   float32 sum (no fused multiply-add). A residual behind a convolution is such a term.
5. Movement and MaxPool move codes. Functions of one value are tables: float32 function of the
   dequantized code, then requantised. Mul: product of the two codes, scale sa·sb; by a positive
   constant: the scale of every term times it.
6. What no QuantizeLinear follows leaves as float32: float32(acc) · scale, summed over terms.
Everything else runs in float by ONNX Runtime: float islands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.quantization import integer_ops
from edgepipe.quantization.float_node import FloatNodes
from edgepipe.quantization.graph import Array, bounds, constant, dims, is_op, name_of

INT_LIMITS = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
}


@dataclass(frozen=True)
class Term:
    """``integers`` int32 (float32 after a linear Resize), ``scale`` float32 that broadcasts."""

    integers: Array
    scale: Array

    @property
    def uniform(self) -> bool:
        """Whether one scale serves all elements."""
        return self.scale.size == 1

    def value(self) -> Array:
        """Float32."""
        return self.integers.astype(np.float32) * self.scale


@dataclass(frozen=True)
class Sum:
    """A tensor not yet rounded: the sum of its terms, cut to ``low`` … ``high``."""

    terms: tuple[Term, ...]
    low: float = -np.inf
    high: float = np.inf

    @property
    def single(self) -> Term | None:
        """The only term of an uncut tensor with one scale: a tensor of codes."""
        whole = len(self.terms) == 1 and self.low == -np.inf and self.high == np.inf
        return self.terms[0] if whole and self.terms[0].uniform else None

    def value(self) -> Array:
        """Float32 result where nothing rounds it."""
        total = self.terms[0].value()
        for term in self.terms[1:]:
            total = total + term.value()
        return np.clip(total, np.float32(self.low), np.float32(self.high))


Tensor = Any  # Array or Sum


def requantize(x: Sum, scale: Array, zero_point: int, low: int, high: int) -> Array:
    """Codes int32 of a sum on the grid (scale, zero point), low ≤ code ≤ high."""
    total: Array | None = None
    for term in x.terms:
        multiplier = np.asarray(term.scale / scale, np.float32)
        part = term.integers.astype(np.float32) * multiplier
        total = part if total is None else total + part
    assert total is not None
    first, last = low - zero_point, high - zero_point
    if x.low > -np.inf:
        first = max(first, int(np.rint(np.float32(x.low) / scale)))
    if x.high < np.inf:
        last = min(last, int(np.rint(np.float32(x.high) / scale)))
    return np.clip(np.rint(total), first, last).astype(np.int32) + np.int32(zero_point)


class Interpreter:
    """Runs a Q/DQ model, sample by sample. ``floats`` lists the nodes computed in float."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.floats: list[str] = []
        self._float_nodes = FloatNodes()
        self._constants: dict[ir.Value, Tensor] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Output name → array. ``codes`` of inner tensors: see ``trace``."""
        values = self.trace(inputs)
        return {name_of(v): _as_float(values[v]) for v in self.graph.outputs}

    def trace(self, inputs: Mapping[str, Array]) -> dict[ir.Value, Tensor]:
        """Every value: codes (int32) behind QuantizeLinear, arrays or ``Sum`` elsewhere."""
        values: dict[ir.Value, Tensor] = {
            v: np.asarray(inputs[name_of(v)]) for v in self.graph.inputs if v.name in inputs
        }
        self.floats = []
        for node in self.graph:
            for value, result in zip(node.outputs, self._node(node, values), strict=False):
                values[value] = result
        return values

    def _get(self, value: ir.Value, values: dict[ir.Value, Tensor]) -> Tensor:
        if value in values:
            return values[value]
        array = constant(value)
        assert array is not None, f"{value.name} is not computed yet"
        return array

    def _node(self, node: ir.Node, values: dict[ir.Value, Tensor]) -> list[Tensor]:
        inputs = [None if v is None else self._get(v, values) for v in node.inputs]
        if is_op(node, "QuantizeLinear"):
            return [_quantize(node, inputs)]
        if is_op(node, "DequantizeLinear"):
            return [self._dequantize(node, inputs)]
        if node.domain == "":
            result = _integer(node, inputs)
            if result is not None:
                return result
        if not _table(node, inputs):
            self.floats.append(node.name or node.op_type)
        arrays = [_as_float(x) if isinstance(x, Sum) else x for x in inputs]
        found = self._float_nodes.run(node, arrays)
        if _table(node, inputs):
            one = np.ones((), np.float32)
            return [Sum((Term(found[0], one),))]
        return list(found)

    def _dequantize(self, node: ir.Node, inputs: list[Tensor]) -> Tensor:
        source = node.inputs[0]
        assert source is not None
        if source in self._constants:
            return self._constants[source]
        codes, scale = inputs[0].astype(np.int32), np.asarray(inputs[1], np.float32)
        if node.attributes.get_int("block_size", 0):
            size, axis = (
                node.attributes.get_int("block_size", 0),
                node.attributes.get_int("axis", 1),
            )
            spread = np.repeat(scale, size, axis).take(range(codes.shape[axis]), axis)
            return codes.astype(np.float32) * spread
        shape = [1] * codes.ndim
        if codes.ndim:
            shape[node.attributes.get_int("axis", 1) % codes.ndim] = -1
        if len(inputs) > 2 and inputs[2] is not None:
            zero = inputs[2].astype(np.int32)
            codes = codes - (zero.reshape(shape) if zero.ndim else zero)
        if scale.ndim == 1:
            scale = scale.reshape(shape)
        result = Sum((Term(codes, scale),))
        if constant(source) is not None:
            self._constants[source] = result
        return result


def _as_float(x: Tensor) -> Array:
    return x.value() if isinstance(x, Sum) else x


def _quantize(node: ir.Node, inputs: list[Tensor]) -> Array:
    zero_value = node.inputs[2]
    assert zero_value is not None and zero_value.dtype is not None
    low, high = INT_LIMITS[zero_value.dtype]
    scale, zero = np.asarray(inputs[1], np.float32), int(inputs[2])
    x = inputs[0]
    if isinstance(x, Sum):
        return requantize(x, scale, zero, low, high)
    moved = np.clip(np.rint(np.asarray(x, np.float32) / scale), low - zero, high - zero)
    result: Array = moved.astype(np.int32) + np.int32(zero)
    return result


def scalar_factor(node: ir.Node) -> Array | None:
    """The positive float32 constant that a Mul multiplies its first operand by."""
    array = constant(node.inputs[1]) if is_op(node, "Mul") else None
    if array is None or array.size != 1 or array.dtype != np.float32 or not array.reshape(()) > 0:
        return None
    same = dims(node.inputs[0]) == dims(node.outputs[0]) if node.inputs[0] is not None else False
    return array.reshape(()) if same else None


def _table(node: ir.Node, inputs: list[Tensor]) -> bool:
    """A function of one tensor of codes, so at most 256 different results."""
    from edgepipe.quantization.placement import TABLES

    x = inputs[0] if inputs else None
    return is_op(node, *TABLES) and isinstance(x, Sum) and x.single is not None


def _integer(node: ir.Node, inputs: list[Tensor]) -> list[Tensor] | None:
    """The integer form of a node, or None where there is none."""
    from edgepipe.quantization.integer_movement import move

    first = inputs[0] if inputs else None
    if not isinstance(first, Sum):
        return None
    limits = bounds(node)
    if limits is not None:
        return [replace(first, low=max(first.low, limits[0]), high=min(first.high, limits[1]))]
    second = inputs[1] if len(inputs) > 1 else None
    if is_op(node, "Add") and isinstance(second, Sum):
        return _add(node, first, second)
    if (factor := scalar_factor(node)) is not None:
        terms = [replace(t, scale=np.asarray(t.scale * factor, np.float32)) for t in first.terms]
        return [Sum(tuple(terms), float(first.low * factor), float(first.high * factor))]
    term = first.single
    if term is None:
        return None
    if isinstance(second, Sum) and len(second.terms) == 1:
        if is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
            return _product(node, term, second.terms[0], inputs[2] if len(inputs) > 2 else None)
        if is_op(node, "Mul") and second.single is not None:
            product = integer_ops.to_int32(
                term.integers.astype(np.int64) * second.single.integers, node.name
            )
            return [Sum((Term(product, np.asarray(term.scale * second.single.scale)),))]
        if is_op(node, "Sub") and second.single is not None:
            negative = Term(second.single.integers, -second.single.scale)
            return [Sum((term, negative))]
    return move(node, term, inputs)


def same_scale(product: Array, bias: Array) -> bool:
    """Whether a constant bias has the scale of the product that it is added to: one or one per
    output of the product, and no fewer of the bias."""
    own, other = (np.asarray(scale, np.float32).reshape(-1) for scale in (product, bias))
    return own.size in (1, other.size) and bool((own == other).all())


def _is_stored(value: ir.Value | None) -> bool:
    """Whether ``value`` is dequantized from codes that are in the model."""
    source = None if value is None else value.producer()
    if source is None or not is_op(source, "DequantizeLinear"):
        return False
    return constant(source.inputs[0]) is not None


def _biased(x: Sum, bias: Sum) -> list[Tensor] | None:
    """A bias added to a product of its own scale: on the accumulator, as Conv and Gemm have it."""
    term, held = x.terms[0], bias.terms[0]
    vector = held.integers.ndim == 1 and term.integers.ndim > 1
    if len(x.terms) > 1 or not vector or x.low > -np.inf or x.high < np.inf:
        return None
    if not same_scale(term.scale, held.scale):
        return None
    sums = term.integers.astype(np.int64) + held.integers
    return [Sum((Term(integer_ops.to_int32(sums, None), term.scale),))]


def _add(node: ir.Node, first: Sum, second: Sum) -> list[Tensor] | None:
    for x, bias, held in ((first, second, 1), (second, first, 0)):
        found = _biased(x, bias) if _is_stored(node.inputs[held]) else None
        if found is not None:
            return found
    cut = [x for x in (first, second) if x.low > -np.inf or x.high < np.inf]
    if cut:
        return None
    if any(x.terms[0].scale.size > 1 and x.terms[0].integers.ndim == 1 for x in (first, second)):
        return None
    return [Sum(first.terms + second.terms)]


def _product(node: ir.Node, x: Term, w: Term, bias: Tensor) -> list[Tensor] | None:
    scale = np.asarray(x.scale * w.scale, np.float32)
    if is_op(node, "Conv"):
        sums = integer_ops.convolve(node, x.integers, w.integers)
        per_channel = scale.reshape(-1)
    elif is_op(node, "ConvTranspose"):
        sums = integer_ops.convolve_transposed(node, x.integers, w.integers)
        per_channel = np.tile(scale.reshape(-1), node.attributes.get_int("group", 1))
    else:
        sums = integer_ops.multiply(node, x.integers, w.integers)
        per_channel = scale.reshape(-1)
    convolution = sums.ndim > 2 and node.op_type != "MatMul"
    shape = (1, -1, *(1,) * (sums.ndim - 2)) if convolution else (-1,)
    if isinstance(bias, Sum):
        held = bias.terms[0].integers.reshape(shape)
        sums = integer_ops.to_int32(sums.astype(np.int64) + held, node.name)
    elif bias is not None:
        return None
    final = per_channel if per_channel.size == 1 else per_channel.reshape(shape)
    return [Sum((Term(sums, final.reshape(()) if final.size == 1 else final),))]
