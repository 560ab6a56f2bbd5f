"""The float64 reference: an ONNX model evaluated in double precision.

It tells how much of a difference is the network's own doing. Two correct float32 programs
differ by their order of summation, and some networks amplify that; the distance of either from
a float64 run measures the amplification.

The model is rewritten to double and run by the ONNX reference evaluator, with convolution and
pooling replaced by vectorised versions (the evaluator's own take minutes on image networks).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = NDArray[Any]

_FLOAT, _DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE


class Float64Model:
    """``model`` (external data loaded) in double precision. ``run`` may be called repeatedly."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._evaluator = ReferenceEvaluator(to_double(model), new_ops=_OPERATORS)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Evaluate on ``inputs`` by name; float32 arrays are widened, float64 outputs returned."""
        widened = {
            name: value.astype(np.float64) if value.dtype == np.float32 else value
            for name, value in inputs.items()
        }
        names: list[str] = list(self._evaluator.output_names)
        with np.errstate(all="ignore"):
            results = self._evaluator.run(None, widened)
        return dict(zip(names, map(np.asarray, results), strict=True))


def to_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with every float32 tensor, cast and declared type made float64."""
    double = onnx.ModelProto()
    double.CopyFrom(model)
    _widen_graph(double.graph)
    for function in double.functions:
        for node in function.node:
            _widen_node(node)
    return double


def _widen_graph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in itertools.chain(graph.input, graph.output, graph.value_info):
        if value.type.tensor_type.elem_type == _FLOAT:
            value.type.tensor_type.elem_type = _DOUBLE
    for node in graph.node:
        _widen_node(node)


def _widen_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen_tensor(attribute.t)
        if attribute.HasField("g"):
            _widen_graph(attribute.g)
        for graph in attribute.graphs:
            _widen_graph(graph)
        if attribute.name in ("to", "dtype", "output_dtype") and attribute.i == _FLOAT:
            attribute.i = _DOUBLE
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = numpy_helper.from_array(np.zeros(1, np.float64))
        node.attribute.append(onnx.helper.make_attribute("value", zero))
    if node.op_type == "Constant":
        for attribute in node.attribute:
            if attribute.name in ("value_float", "value_floats"):
                values = attribute.f if attribute.name == "value_float" else attribute.floats
                array = np.asarray(values, dtype=np.float32).astype(np.float64)
                attribute.CopyFrom(
                    onnx.helper.make_attribute("value", numpy_helper.from_array(array))
                )


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == _FLOAT:
        wide = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))


def _pads(
    auto_pad: str | None,
    pads: Sequence[int] | None,
    spatial: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:
    """(before, after) per spatial axis, by the ONNX definition of ``auto_pad``."""
    rank = len(spatial)
    if auto_pad in (None, "", "NOTSET"):
        flat = list(pads or [0] * (2 * rank))
        return list(zip(flat[:rank], flat[rank:], strict=True))
    if auto_pad == "VALID":
        return [(0, 0)] * rank
    result = []
    for size, k, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        result.append((small, large) if auto_pad == "SAME_UPPER" else (large, small))
    return result


def _windows(
    x: Array,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> Array:
    """View of padded ``x`` [N, C, *spatial] as [N, C, *output, *kernel]."""
    rank = len(kernel)
    extent = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    view = sliding_window_view(x, extent, axis=tuple(range(2, 2 + rank)))
    slices = [slice(None)] * 2 + [slice(None, None, s) for s in strides]
    return view[(*slices, *(slice(None, None, d) for d in dilations))]


class Conv(OpRun):  # type: ignore[misc]
    """ONNX Conv of any rank as one matrix product per group, x [N, C, *spatial]."""

    def _run(  # type: ignore[no-untyped-def]
        self,
        x,
        w,
        b=None,
        auto_pad=None,
        dilations=None,
        group=None,
        kernel_shape=None,
        pads=None,
        strides=None,
    ):
        kernel, rank, groups = w.shape[2:], w.ndim - 2, group or 1
        strides, dilations = strides or [1] * rank, dilations or [1] * rank
        padding = _pads(auto_pad, pads, x.shape[2:], kernel, strides, dilations)
        windows = _windows(np.pad(x, [(0, 0), (0, 0), *padding]), kernel, strides, dilations)
        batch, channels, *space = windows.shape[: 2 + rank]
        if groups == channels and w.shape[0] == channels:
            axes = "abcdef"[: 2 + rank], "uvw"[:rank]
            y = np.einsum(f"{axes[0]}{axes[1]},b{axes[1]}->{axes[0]}", windows, w[:, 0])
        else:
            parts = []
            per_in, per_out = channels // groups, w.shape[0] // groups
            for g in range(groups):
                part = windows[:, g * per_in : (g + 1) * per_in]
                columns = np.moveaxis(part, 1, 1 + rank).reshape(batch, int(np.prod(space)), -1)
                weights = w[g * per_out : (g + 1) * per_out].reshape(per_out, -1)
                parts.append(np.moveaxis(columns @ weights.T, 2, 1))
            y = np.concatenate(parts, axis=1).reshape(batch, w.shape[0], *space)
        return (y if b is None else y + b.reshape(1, -1, *[1] * rank),)


class BatchNormalization(OpRun):  # type: ignore[misc]
    """ONNX BatchNormalization in inference mode (the evaluator's opset-9 version trains)."""

    def _run(  # type: ignore[no-untyped-def]
        self, x, scale, bias, mean, var, epsilon=None, momentum=None, training_mode=None, **_
    ):
        if training_mode:
            raise NotImplementedError("BatchNormalization in training mode in float64")
        shape = (1, -1, *[1] * (x.ndim - 2))
        gain = scale / np.sqrt(var + (1e-5 if epsilon is None else epsilon))
        return (x * gain.reshape(shape) + (bias - mean * gain).reshape(shape),)


class MaxPool(OpRun):  # type: ignore[misc]
    """ONNX MaxPool without the optional Indices output."""

    def _run(  # type: ignore[no-untyped-def]
        self,
        x,
        auto_pad=None,
        ceil_mode=None,
        dilations=None,
        kernel_shape=None,
        pads=None,
        storage_order=None,
        strides=None,
    ):
        if len(self.onnx_node.output) > 1:
            raise NotImplementedError("MaxPool with indices in float64")
        windows = _pool_windows(
            x, auto_pad, ceil_mode, dilations, kernel_shape, pads, strides, -np.inf
        )
        return (windows.max(axis=tuple(range(x.ndim, windows.ndim))),)


class AveragePool(OpRun):  # type: ignore[misc]
    """ONNX AveragePool; padding counts only where ``count_include_pad`` says so."""

    def _run(  # type: ignore[no-untyped-def]
        self,
        x,
        auto_pad=None,
        ceil_mode=None,
        count_include_pad=None,
        dilations=None,
        kernel_shape=None,
        pads=None,
        strides=None,
    ):
        settings = (auto_pad, ceil_mode, dilations, kernel_shape, pads, strides)
        windows = _pool_windows(x, *settings, 0.0)
        axes = tuple(range(x.ndim, windows.ndim))
        ones = np.ones((1, 1, *x.shape[2:]))
        if count_include_pad:
            rank = x.ndim - 2
            padding = _pads(
                auto_pad,
                pads,
                x.shape[2:],
                kernel_shape,
                strides or [1] * rank,
                dilations or [1] * rank,
            )
            ones = np.pad(ones, [(0, 0), (0, 0), *padding], constant_values=1.0)
            settings = (None, ceil_mode, dilations, kernel_shape, None, strides)
        counts = _pool_windows(ones, *settings, 0.0).sum(axis=axes)
        return (windows.sum(axis=axes) / counts,)


def _pool_windows(
    x: Array,
    auto_pad: str | None,
    ceil_mode: int | None,
    dilations: Sequence[int] | None,
    kernel: Sequence[int],
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
    fill: float,
) -> Array:
    """Windows of ``x`` padded with ``fill``; ``ceil_mode`` adds the last, partial window when it
    starts inside the input or its leading padding (ONNX since opset 19's clarification)."""
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    padding = _pads(auto_pad, pads, x.shape[2:], kernel, strides, dilations)
    if ceil_mode:
        for axis, (before, after) in enumerate(padding):
            size = x.shape[2 + axis]
            extent = (kernel[axis] - 1) * dilations[axis] + 1
            steps = -(-(size + before + after - extent) // strides[axis])
            if steps * strides[axis] >= size + before:
                steps -= 1
            needed = steps * strides[axis] + extent - size - before
            padding[axis] = (before, max(after, needed))
    padded = np.pad(x, [(0, 0), (0, 0), *padding], constant_values=fill)
    return _windows(padded, kernel, strides, dilations)


_OPERATORS = [Conv, BatchNormalization, MaxPool, AveragePool]
