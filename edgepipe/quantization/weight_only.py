"""Weights in 4 or 8 bits for float activations, per output channel or per group of inputs.

A group is a run of input channels of one output channel (and of one kernel tap, for a
convolution): ONNX calls it a block. Where ``group_size`` does not divide the input channels, the
largest divisor below it serves, or the whole channel where that would be tiny.
"""

from __future__ import annotations

import numpy as np

from edgepipe.quantization import gptq, reconstruction, scales
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.remarks import Note
from edgepipe.quantization.scales import CodeRange
from edgepipe.quantization.weights import LayerWeights


def block_size(channels: int, group_size: int | None) -> int | None:
    """Block for this many input channels; None for one scale per output channel."""
    if group_size is None or channels <= 1:
        return None
    fitting = max(d for d in range(1, min(group_size, channels) + 1) if channels % d == 0)
    return fitting if fitting * 4 >= min(group_size, channels) else None


def quantize_weights(
    layer: Layer,
    span: CodeRange,
    group_size: int | None,
    method: str | None,
    gram: Gram | None,
    note: Note,
) -> LayerWeights:
    """Codes and scales by one of config.WEIGHT_ONLY_FITS, which need ``gram``, or by rounding."""
    axis = layer.input_axis
    block = block_size(layer.weight_shape[axis], group_size)
    if group_size is not None and block != group_size:
        note(
            layer.node.name,
            f"groups of {block or 'a whole channel'} instead of {group_size}: there are"
            f" {layer.weight_shape[axis]} input channels",
        )
    target, hessian = layer.matrix(layer.weight), None
    if gram is not None and method in ("gptq", "reconstruction"):
        hessian = gptq.unit(gptq.regularised(gram)).astype(np.float64)
    if gram is not None and method == "reconstruction":
        target = reconstruction.target_weights(layer.matrix(layer.weight), gram, span.bits)
    scale, spread = _scales(layer, target, hessian, span, block)
    if hessian is None:
        codes = scales.quantize(target, spread, span)
    else:
        codes = gptq.Walk.of(hessian).round(target, spread, span)
        if method == "reconstruction":
            single = hessian.astype(np.float32)
            codes = reconstruction.descend(codes, target, single, spread, span)
    bias = layer.bias
    if gram is not None and layer.node.op_type != "MatMul":
        bias = gptq.centred(codes * spread, gram).reshape(-1).astype(np.float32)
    return LayerWeights(
        layer.restore(codes).astype(np.int8),
        scale,
        span.bits,
        layer.axis if block is None else axis,
        block,
        bias,
    )


def _scales(
    layer: Layer, target: Array, hessian: Array | None, span: CodeRange, block: int | None
) -> tuple[Array, Array]:
    """Scales as ONNX stores them, and spread over the matrix [groups, outputs, 1 or K]."""
    importance = None
    if hessian is not None:
        diagonal = np.diagonal(hessian, axis1=1, axis2=2)[:, None, :].astype(np.float32)
        importance = np.broadcast_to(diagonal, target.shape)
    if block is None:
        scale = scales.least_error(target, span, importance)
        return scale.reshape(-1).astype(np.float32), scale
    axis = layer.input_axis

    def blocks(matrix: Array) -> Array:
        moved = np.moveaxis(layer.restore(matrix), axis, -1)
        return moved.reshape(*moved.shape[:-1], -1, block)

    found = scales.least_error(
        blocks(target), span, None if importance is None else blocks(importance)
    )[..., 0]
    stored = np.ascontiguousarray(np.moveaxis(found, -1, axis), np.float32)
    return stored, layer.matrix(np.repeat(stored, block, axis))
