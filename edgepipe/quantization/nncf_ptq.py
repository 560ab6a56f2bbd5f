"""Post-training quantization by nncf (Intel, Apache-2.0), brought into our Q/DQ form.

nncf chooses the ranges of activations, per-channel weight scales and corrected biases (its
fast bias correction). Which tensors are quantized, what shares a scale and what is fused stays
with ``placement``; a tensor that nncf does not quantize keeps the range of our observer. Its
activations are forced per tensor: by default it gives depthwise inputs one scale per channel,
which no integer kernel can accumulate.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError
from edgepipe.quantization import scales
from edgepipe.quantization.graph import Array, name_of
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.observers import GridStyle
from edgepipe.quantization.remarks import Note
from edgepipe.quantization.weights import check_weights, finish

if TYPE_CHECKING:
    import onnx

    from edgepipe.quantization.config import QuantConfig
    from edgepipe.quantization.executor import Rounding, Values

#: Largest magnitude of nncf's own weight codes.
NNCF_LIMIT = 127


@dataclass(frozen=True)
class _Found:
    """What nncf chose: ranges by tensor, weight scales and biases by the output of their node."""

    ranges: dict[str, tuple[float, float]]
    scales: dict[str, Array]
    biases: dict[str, Array]


def fit(
    model: ir.Model, rounding: Rounding, inputs: Values, config: QuantConfig, note: Note
) -> None:
    """Replace the grids of ``rounding`` and set its weights. Raises UserError without nncf."""
    if importlib.util.find_spec("nncf") is None:
        raise UserError(
            "method 'nncf' needs nncf",
            where="methods",
            fix="pip install 'edgepipe[nncf]', or choose 'reconstruction'",
        )
    linear = [unit.linear for unit in rounding.placement.units if unit.linear is not None]
    for node in linear:
        check_weights(Layer.of(node), note)
    found = _read(_quantize(ir.serde.serialize_model(model), inputs, config))
    _set_grids(rounding, found, config, note)
    for node in linear:
        _set_weights(node, rounding, found, config, note)


def _quantize(model: onnx.ModelProto, inputs: Values, config: QuantConfig) -> onnx.ModelProto:
    # It reports every call over the network unless it believes to be in its makers' tests.
    os.environ.setdefault("NNCF_CI", "1")
    import nncf
    from nncf.quantization.advanced_parameters import (
        AdvancedQuantizationParameters,
        QuantizationParameters,
    )

    count = len(next(iter(inputs.values())))
    samples = [{name_of(v): a[i] for v, a in inputs.items()} for i in range(count)]
    preset = "PERFORMANCE" if config.symmetric_activations else "MIXED"
    per_tensor = QuantizationParameters(per_channel=False)
    result: onnx.ModelProto = nncf.quantize(
        model,
        nncf.Dataset(samples),
        preset=getattr(nncf.QuantizationPreset, preset),
        subset_size=count,
        advanced_parameters=AdvancedQuantizationParameters(
            activations_quantization_params=per_tensor
        ),
    )
    return result


def _read(model: onnx.ModelProto) -> _Found:
    """Ranges, scales and biases out of nncf's Q/DQ graph, whose own names stay."""
    import onnx

    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    ranges: dict[str, tuple[float, float]] = {}
    restored: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in held:
            ranges[node.input[0]] = _range(held[node.input[1]], held[node.input[2]])
        elif node.op_type == "DequantizeLinear" and node.input[0] in held:
            restored[node.output[0]] = held[node.input[1]]
    weights: dict[str, Array] = {}
    biases: dict[str, Array] = {}
    for node in model.graph.node:
        if len(node.input) > 1 and node.input[1] in restored:
            weights[node.output[0]] = restored[node.input[1]]
            if len(node.input) > 2 and node.input[2] in held:
                biases[node.output[0]] = held[node.input[2]]
    return _Found(ranges, weights, biases)


def _range(scale: Array, zero: Array) -> tuple[float, float]:
    limits: Any = np.iinfo(zero.dtype)
    low, high = ((end - int(zero)) * float(scale) for end in (limits.min, limits.max))
    return low, high


def _set_grids(rounding: Rounding, found: _Found, config: QuantConfig, note: Note) -> None:
    members: dict[int, list[str]] = {}
    for value, number in rounding.placement.group.items():
        members.setdefault(number, []).append(name_of(value))
    for number, names in members.items():
        ends = [found.ranges[name] for name in names if name in found.ranges]
        if not ends:
            note(names[0], "nncf gives this tensor no range: that of the observer stays")
            continue
        style = GridStyle(
            rounding.placement.bits[number], config.signed_activations, config.symmetric_activations
        )
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        rounding.grids[number] = style.grid(low, high)


def _set_weights(
    node: ir.Node, rounding: Rounding, found: _Found, config: QuantConfig, note: Note
) -> None:
    layer, name = Layer.of(node), name_of(node.outputs[0])
    span = rounding.placement.formats[node].span
    matrix = layer.matrix(layer.weight)
    scale = scales.covering(matrix, span)
    if name in found.scales and found.scales[name].size == scale.size:
        given = found.scales[name].reshape(scale.shape) * np.float32(NNCF_LIMIT / span.high)
        scale = np.where(np.abs(matrix).max(-1, keepdims=True) > scales.DEAD, given, scale)
    else:
        note(node.name, "nncf gives its weights no scales: they cover the largest weight")
    source = node.inputs[0]
    assert source is not None
    bias = np.asarray(found.biases.get(name, layer.bias), np.float32).reshape(-1)
    rounding.weights[node] = finish(
        layer,
        scales.quantize(matrix, scale, span),
        scale,
        bias,
        span,
        float(rounding.grid(source).scale),
        note,
    )
