"""What a Q/DQ graph says: grids, integer weights, and what is fused between two roundings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.errors import Unsupported
from edgepipe.interchange.tflite.network import Array, Grid
from edgepipe.quantization.graph import bounds, constant, dims, is_op, name_of, only_user

#: The fix for a graph that rounds at other places than tflite does.
CONFIG_FIX = "quantize with the configuration that edgepipe.interchange.tflite.config returns"


def unsupported(node: ir.Node, reason: str, fix: str | None = None) -> Unsupported:
    """The error for an operator without a tflite form."""
    return Unsupported(
        f"{node.op_type} '{node.name}' has no tflite form: {reason}",
        where="tflite",
        fix=fix or "keep this network in ONNX, or compile it into a bundle",
    )


@dataclass(frozen=True)
class Result:
    """What becomes of one output of an operator.

    ``value`` is the float tensor after the Relu or Clip fused behind the operator, ``low`` and
    ``high`` their bounds. ``grid`` is that of the QuantizeLinear behind it and ``key`` the codes
    that it writes; without one ``grid`` is None and ``key`` the float tensor itself.
    ``absorbed`` are the fused nodes.
    """

    value: ir.Value
    key: ir.Value
    grid: Grid | None
    low: float = -np.inf
    high: float = np.inf
    absorbed: tuple[ir.Node, ...] = ()


def result_of(output: ir.Value) -> Result:
    """Follow an operator's output to the QuantizeLinear that rounds it, if there is one."""
    value, low, high = output, -np.inf, np.inf
    absorbed: list[ir.Node] = []
    while True:
        quantizer = next(
            (use.node for use in value.uses() if is_op(use.node, "QuantizeLinear")), None
        )
        if quantizer is not None:
            nodes = (*absorbed, quantizer)
            return Result(value, quantizer.outputs[0], grid_of(quantizer), low, high, nodes)
        after = only_user(value)
        limits = bounds(after) if after is not None else None
        if after is None or limits is None:
            return Result(output, output, None)
        low, high = max(low, limits[0]), min(high, limits[1])
        absorbed.append(after)
        value = after.outputs[0]


def grid_of(node: ir.Node) -> Grid:
    """The int8 grid of a QuantizeLinear or DequantizeLinear; uint8 codes are moved by 128."""
    scale = constant(node.inputs[1])
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = constant(zero)
    if scale is None or scale.size != 1:
        raise unsupported(node, "activations have one constant scale per tensor")
    if (
        zero is None
        or zero_point is None
        or zero.dtype not in (ir.DataType.INT8, ir.DataType.UINT8)
    ):
        raise unsupported(node, "its zero point is no 8-bit constant", CONFIG_FIX)
    offset = 128 if zero.dtype == ir.DataType.UINT8 else 0
    return Grid(float(scale.reshape(())), int(zero_point.reshape(())) - offset)


def codes_of(value: ir.Value) -> ir.Value | None:
    """The codes that a DequantizeLinear restores ``value`` from; None for other producers."""
    node = value.producer()
    if node is None or not is_op(node, "DequantizeLinear") or constant(node.inputs[0]) is not None:
        return None
    codes = node.inputs[0]
    assert codes is not None
    quantizer = codes.producer()
    if quantizer is None or not is_op(quantizer, "QuantizeLinear"):
        raise unsupported(node, "its codes come from no QuantizeLinear")
    if grid_of(node) != grid_of(quantizer):
        raise unsupported(node, f"its scale is not that of '{name_of(codes)}'")
    return codes


def weights_of(node: ir.Node, axis: int) -> tuple[Array, Array]:
    """Codes int8 in ONNX layout, and scales float32 along ``axis``, of a linear operator."""
    weight = node.inputs[1]
    restore = weight.producer() if weight is not None else None
    codes = constant(restore.inputs[0]) if is_op(restore, "DequantizeLinear") and restore else None
    if restore is None or codes is None:
        raise unsupported(node, "its weight is not quantized", CONFIG_FIX)
    if restore.attributes.get_int("block_size", 0):
        raise unsupported(node, "groups share no scale along the reduction", CONFIG_FIX)
    zero = constant(restore.inputs[2]) if len(restore.inputs) > 2 else None
    dtype = restore.inputs[0].dtype if restore.inputs[0] is not None else None
    if dtype not in (ir.DataType.INT8, ir.DataType.INT4) or (zero is not None and np.any(zero)):
        raise unsupported(node, "its weight codes are not symmetric int8 or int4")
    scale = constant(restore.inputs[1])
    assert scale is not None
    if scale.size > 1 and restore.attributes.get_int("axis", 1) % codes.ndim != axis:
        raise unsupported(node, "its weight scales do not belong to output channels")
    scales = np.broadcast_to(np.asarray(scale, np.float32).reshape(-1), (codes.shape[axis],))
    return codes.astype(np.int8), scales.copy()


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is known, behind a DequantizeLinear too."""
    node = value.producer() if value is not None else None
    behind = node is not None and is_op(node, "DequantizeLinear")
    return constant(value) is not None or (
        behind and node is not None and constant(node.inputs[0]) is not None
    )


def constant_of(value: ir.Value | None) -> Array | None:
    """A constant as it is, or as float64 where a DequantizeLinear restores it."""
    held = constant(value)
    if held is not None or value is None or not is_constant(value):
        return held
    node = value.producer()
    assert node is not None
    codes, scale, zero = (
        constant(node.inputs[i]) if len(node.inputs) > i else None for i in range(3)
    )
    assert codes is not None and scale is not None
    shape: list[int] = [1] * codes.ndim
    if scale.ndim == 1 and codes.ndim:
        shape[node.attributes.get_int("axis", 1) % codes.ndim] = -1
    moved = codes.astype(np.float64)
    if zero is not None:
        moved = moved - zero.astype(np.float64).reshape(shape)
    product: Array = moved * scale.astype(np.float64).reshape(shape)
    return product


def bias_behind(node: ir.Node, width: int) -> tuple[Any, ir.Node] | None:
    """The constant [width] that an Add puts on a MatMul by a constant, and the Add."""
    add = only_user(node.outputs[0])
    if add is None or not is_op(add, "Add") or not is_constant(node.inputs[1]):
        return None
    other = next((v for v in add.inputs if v is not node.outputs[0]), None)
    held = constant_of(other)
    if held is None or held.shape[-1:] != (width,) or held.size != width:
        return None
    return held.reshape(-1), add


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The static shape of a tensor."""
    shape = dims(value)
    if shape is None:
        raise Unsupported(f"'{value.name}' has no static shape", where="tflite")
    return shape
