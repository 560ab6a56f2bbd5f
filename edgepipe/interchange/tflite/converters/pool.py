"""Pools and means.

1. MaxPool → MAX_POOL_2D; pads other than SAME hold the lowest code.
2. AveragePool whose windows all count the same → a depthwise convolution with weights 1 and scale
   1 / count: it rounds to the output's grid, which is finer than the input's, to which
   AVERAGE_POOL_2D rounds. Windows cut off at the edges → AVERAGE_POOL_2D.
3. GlobalAveragePool and ReduceMean → MEAN.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgepipe.interchange.tflite import schema
from edgepipe.interchange.tflite.layout import Place
from edgepipe.interchange.tflite.reading import unsupported
from edgepipe.interchange.tflite.translation import LOWEST, Step, Translation, parameter
from edgepipe.interchange.tflite.windows import Pair, Windows, padded


def maximum(t: Translation, step: Step) -> None:
    """Case 1."""
    node = step.node
    windows = Windows.of(node, tuple(node.attributes.get_ints("kernel_shape")))
    if set(windows.dilations) != {1}:
        raise unsupported(node, "it is dilated")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise unsupported(node, "its indices are read")
    x = t.read(node.inputs[0], channels_last=True)
    x, padding = padded(t, step, x, windows, LOWEST)
    t.write(
        step, "MAX_POOL_2D", [x], Place(0, step.shape, x.grid, True), **_options(windows, padding)
    )


def average(t: Translation, step: Step) -> None:
    """Case 2."""
    node = step.node
    windows = Windows.of(node, tuple(node.attributes.get_ints("kernel_shape")))
    x = t.codes(step, node.inputs[0], channels_last=True)
    pads_count = bool(node.attributes.get_int("count_include_pad", 0))
    counts = _with_pads(windows).counts() if pads_count else windows.counts()
    if (counts != counts.flat[0]).any():
        counted = pads_count and any((*windows.begins, *windows.graph_ends))
        if counted or not windows.same or set(windows.dilations) != {1}:
            raise unsupported(node, "its windows count differently at the edges")
        like = Place(0, step.shape, x.grid, True)
        t.write(step, "AVERAGE_POOL_2D", [x], like, **_options(windows, schema.SAME))
        return
    x, padding = padded(t, step, x, windows)
    t.write(
        step,
        "DEPTHWISE_CONV_2D",
        [x, *ones(t, x, windows.kernel, float(counts.flat[0]))],
        Place(0, step.shape, step.grid, True),
        padding=padding,
        stride_h=windows.strides[0],
        stride_w=windows.strides[1],
        depth_multiplier=1,
        dilation_h=windows.dilations[0],
        dilation_w=windows.dilations[1],
    )


def mean(t: Translation, step: Step) -> None:
    """Case 3."""
    node = step.node
    x = t.codes(step, node.inputs[0])
    rank = len(x.shape)
    keep = True
    axes = tuple(range(2, rank))
    if node.op_type == "ReduceMean":
        held = parameter(step, 1, "axes")
        axes = tuple(range(rank)) if held is None else tuple(int(a) % rank for a in held.flat)
        keep = bool(node.attributes.get_int("keepdims", 1))
        if not axes:
            raise unsupported(node, "it reduces no axis")
    remaining = [axis for axis in range(rank) if axis not in axes]
    if (
        x.channels_last
        and not keep
        and [x.axis(a) for a in remaining] != sorted(x.axis(a) for a in remaining)
    ):
        x = t.codes(step, node.inputs[0], channels_last=False)
    stored = [x.axis(a) for a in axes]
    if x.channels_last and rank == 3 and not keep:
        stored.append(1)  # the row that the graph does not have
    index = t.network.integers(sorted(stored), "axes")
    like = Place(0, step.shape, step.grid, x.channels_last and keep)
    t.write(step, "MEAN", [x, index], like, keep_dims=keep)


def ones(t: Translation, x: Place, kernel: Pair, divisor: float) -> tuple[int, int]:
    """Weights and biases of a depthwise convolution that sums windows and divides."""
    channels = x.shape[1]
    assert x.grid is not None
    scales = np.full(channels, np.float32(1) / np.float32(divisor), np.float32)
    weight = np.ones((1, *kernel, channels), np.int8)
    bias_scales = np.float32(x.grid.scale) * scales
    return (
        t.network.constant(weight, "ones", scales, axis=3),
        t.network.constant(np.zeros(channels, np.int32), "zeros", bias_scales),
    )


def _options(windows: Windows, padding: int) -> dict[str, int]:
    return {
        "padding": padding,
        "stride_h": windows.strides[0],
        "stride_w": windows.strides[1],
        "filter_h": windows.kernel[0],
        "filter_w": windows.kernel[1],
    }


def _with_pads(windows: Windows) -> Windows:
    """The graph's pads as elements of the input; what ceil mode adds stays outside."""
    edges = zip(windows.sizes, windows.begins, windows.graph_ends, strict=True)
    height, width = (n + b + e for n, b, e in edges)
    return replace(windows, sizes=(height, width), begins=(0, 0))
