"""Quantized weights of one layer: integers, scales and the int32 bias, by a chosen method."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import numpy as np

from edgepipe.errors import UserError
from edgepipe.quantization import activation_aware, gptq, reconstruction, scales
from edgepipe.quantization.activation_aware import Rows, Solver
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.remarks import Note
from edgepipe.quantization.scales import CodeRange

#: Largest bias code: accumulators need the rest of the int32 for the products.
BIAS_LIMIT = 2**30
#: Products of two scales stay normal float32 numbers above this.
SMALLEST_PRODUCT = float(np.finfo(np.float32).tiny) * 256
#: A layer with this share of zeros among its weights was pruned.
PRUNED_ZEROS = 0.2
#: Bounds of the mean-and-variance match: a channel further off is dead or wrong, not scaled.
VARIANCE_RANGE = (0.5, 2.0)


@dataclass(frozen=True)
class LayerWeights:
    """``codes``: int8 in the ONNX layout of the weight. ``scale``: float32 per output channel
    along ``axis``, or with the weight's rank where ``group_size`` is given. ``bias_codes`` int32
    [outputs] with scale ``bias_scale``, both None for a float bias (``bias``)."""

    codes: Array
    scale: Array
    bits: int
    axis: int
    group_size: int | None
    bias: Array
    bias_codes: Array | None = None
    bias_scale: Array | None = None

    def float_weight(self) -> Array:
        """What the codes stand for, float32 in ONNX layout."""
        if self.group_size is not None:
            size = self.codes.shape[self.axis]
            spread = np.repeat(self.scale, self.group_size, self.axis)
            spread = np.take(spread, range(size), self.axis)
            result: Array = self.codes.astype(np.float32) * spread
            return result
        shape: list[int] = [1] * self.codes.ndim
        shape[self.axis] = -1
        return self.codes.astype(np.float32) * self.scale.reshape(shape)

    def float_bias(self) -> Array:
        """What the bias stands for, float32 [outputs]."""
        if self.bias_codes is None or self.bias_scale is None:
            return self.bias
        return self.bias_codes.astype(np.float32) * self.bias_scale


def check_weights(layer: Layer, note: Note) -> None:
    """Refuse weights and biases that are not finite; note channels that are all zero."""
    name = layer.node.inputs[1].name if layer.node.inputs[1] is not None else None
    for what, array in (("weight", layer.weight), ("bias", layer.bias)):
        if not np.isfinite(array).all():
            raise UserError(
                f"the {what} of {layer.node.op_type} '{layer.node.name}' is not finite",
                where=f"tensor '{name}'",
                fix="repair or retrain the model before quantizing it",
            )
    peak = np.abs(layer.matrix(layer.weight)).max(-1)
    dead = int((peak <= scales.DEAD).sum())
    if dead == peak.size:
        note(name, "all weights are zero: the layer is its bias", doubt=True)
    elif dead:
        note(name, f"{dead} of {peak.size} output channels have only zero weights", doubt=True)


def quantize_layer(
    layer: Layer,
    span: CodeRange,
    method: str | None,
    gram: Gram | None,
    input_scale: float,
    note: Note,
    rows: Rows | None = None,
) -> LayerWeights:
    """Quantize per output channel; ``input_scale`` is that of the quantized input.

    ``method`` is one of config.FITS, or None for rounding onto the scale of least squared error;
    all but None need ``gram``. ``rows`` are those of ``gram``, where an
    activation follows. Where a layer has been pruned, its zeros stay.
    """
    matrix = layer.matrix(layer.weight)
    kept = matrix != 0
    pruned = kept if kept.mean() <= 1 - PRUNED_ZEROS else None
    grouped_bias = layer.bias.reshape(layer.groups, -1)
    solver = solver_of(method)
    if solver is not None and gram is not None:
        if rows is None:
            codes, scale, bias = solver(matrix, gram, span, pruned)
        else:
            codes, scale, bias = activation_aware.solve(solver, matrix, gram, span, rows, pruned)
        # A channel that sees only constants has nothing to be fitted to.
        idle = gram.variance_y <= 0.0
        if idle.any():
            note(layer.node.name, f"{int(idle.sum())} output channels never change", doubt=True)
    else:
        scale = scales.least_error(matrix, span)
        codes = scales.quantize(matrix, scale, span)
        bias = grouped_bias
        if method in ("bias_correction", "mean_variance") and gram is not None:
            if method == "mean_variance":
                scale = scale * _variance_ratio(codes * scale, gram)[..., None]
            bias = gptq.centred(codes * scale, gram)
    return finish(layer, codes, scale, bias.reshape(-1), span, input_scale, note)


def solver_of(method: str | None) -> Solver | None:
    """What solves a layer's moments for codes, by the name of the method; None if nothing does.

    Raises UserError where the method needs torch and it is not installed.
    """
    if method == "reconstruction":
        return reconstruction.solve
    if method == "gptq":
        return gptq.solve
    if method in ("adaround", "adaquant"):
        if importlib.util.find_spec("torch") is None:
            raise UserError(
                f"method '{method}' needs torch",
                where="methods",
                fix="pip install 'edgepipe[torch]', or choose 'reconstruction'",
            )
        from edgepipe.quantization import adaquant, adaround

        return adaround.solve if method == "adaround" else adaquant.solve
    return None


def _variance_ratio(weight: Array, gram: Gram) -> Array:
    """How much each output channel's deviation shrank, bounded."""
    found = np.einsum("gok,gkl,gol->go", weight, gram.hessian, weight, optimize=True)
    ratio = np.sqrt(gram.variance_y / np.maximum(found, 1e-20))
    return np.where(found > 1e-12, np.clip(ratio, *VARIANCE_RANGE), 1.0).astype(np.float32)


def finish(
    layer: Layer,
    codes: Array,
    scale: Array,
    bias: Array,
    span: CodeRange,
    input_scale: float,
    note: Note,
) -> LayerWeights:
    """Keep scales and int32 biases in range, and bring everything into ONNX layout."""
    repeat = layer.outputs // scale.size
    flat = scale.reshape(-1).astype(np.float64)
    peak = np.abs(bias).reshape(repeat, -1).max(0)
    needed = np.maximum(peak / (input_scale * BIAS_LIMIT), SMALLEST_PRODUCT / input_scale)
    raised = needed > flat
    if raised.any():
        note(
            layer.node.name,
            f"{int(raised.sum())} weight scales raised: the int32 bias would overflow, or the"
            " product with the input's scale underflow",
            doubt=True,
        )
        ratio = np.where(raised, flat / needed, 1.0).reshape(scale.shape)
        codes = np.clip(np.rint(codes * ratio), span.low, span.high)
        flat = np.where(raised, needed, flat)
    final = flat.astype(np.float32)
    bias_scale = np.tile(np.float32(input_scale) * final, repeat)
    return LayerWeights(
        layer.restore(codes).astype(np.int8),
        final,
        span.bits,
        layer.axis,
        None,
        bias.astype(np.float32),
        np.rint(bias / bias_scale.astype(np.float64)).astype(np.int32),
        bias_scale,
    )
