"""Conv, ConvTranspose, Gemm and MatMul."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgepipe.interchange.tflite import schema
from edgepipe.interchange.tflite.layout import Place
from edgepipe.interchange.tflite.network import Array
from edgepipe.interchange.tflite.reading import constant_of, is_constant, unsupported, weights_of
from edgepipe.interchange.tflite.translation import Step, Translation
from edgepipe.interchange.tflite.windows import Windows, padded
from edgepipe.quantization.graph import is_op


def convolution(t: Translation, step: Step) -> None:
    """Conv → CONV_2D, or DEPTHWISE_CONV_2D where every input channel is its own group."""
    node = step.node
    codes, scales = weights_of(node, 0)
    windows = Windows.of(node, codes.shape[2:])
    x = t.codes(step, node.inputs[0], channels_last=True)
    x, padding = padded(t, step, x, windows)
    images = codes.reshape(*codes.shape[:2], *windows.kernel)
    group, channels = node.attributes.get_int("group", 1), x.shape[1]
    like = Place(0, step.shape, step.grid, True)
    bias = _bias(t, step, x, scales)
    common = {
        "padding": padding,
        "stride_h": windows.strides[0],
        "stride_w": windows.strides[1],
        "dilation_h": windows.dilations[0],
        "dilation_w": windows.dilations[1],
    }
    name = f"{node.name}/weight"
    if group == channels and group > 1:
        taps = np.moveaxis(images.reshape(len(images), *windows.kernel), 0, -1)[None]
        weight = t.network.constant(taps, name, scales, axis=3)
        multiplier = len(images) // channels
        t.write(
            step, "DEPTHWISE_CONV_2D", [x, weight, bias], like, depth_multiplier=multiplier,
            **common,
        )  # fmt: skip
        return
    weight = t.network.constant(np.moveaxis(images, 1, -1), name, scales, axis=0)
    t.write(step, "CONV_2D", [x, weight, bias], like, **common)


def transposed_convolution(t: Translation, step: Step) -> None:
    """ConvTranspose → TRANSPOSE_CONV of all that the kernel reaches, then a crop to the pads."""
    node = step.node
    codes, scales = weights_of(node, 1)
    if node.attributes.get_int("group", 1) != 1 or codes.ndim != 4:
        raise unsupported(node, "only one group over two spatial axes is transposed there")
    if set(node.attributes.get_ints("dilations", (1,))) != {1}:
        raise unsupported(node, "it is dilated")
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise unsupported(node, "its pads are computed")
    x = t.codes(step, node.inputs[0], channels_last=True)
    strides = tuple(node.attributes.get_ints("strides", (1, 1)))
    pads = tuple(node.attributes.get_ints("pads", (0,) * 4))
    full = [(n - 1) * s + k for n, s, k in zip(x.shape[2:], strides, codes.shape[2:], strict=True)]
    out = step.shape[2:]
    if any(p + o > f for p, o, f in zip(pads[:2], out, full, strict=True)):
        raise unsupported(node, "its output reaches further than its kernel")
    weight = t.network.constant(codes.transpose(1, 2, 3, 0), f"{node.name}/weight", scales, axis=0)
    wide = Place(0, (*step.shape[:2], *full), step.grid, True)
    inputs = [
        t.network.integers(wide.stored_shape, "shape"),
        weight,
        x.index,
        _bias(t, step, x, scales),
    ]
    options = {"padding": schema.VALID, "stride_h": strides[0], "stride_w": strides[1]}
    if tuple(full) == tuple(out):
        t.write(step, "TRANSPOSE_CONV", inputs, wide, **options)
        return
    product = t.emit("TRANSPOSE_CONV", inputs, wide, f"{node.name}/uncropped", **options)
    begins = t.network.integers((0, *pads[:2], 0), "begins")
    like = replace(wide, shape=step.shape)
    sizes = t.network.integers(like.stored_shape, "sizes")
    t.write(step, "SLICE", [product, begins, sizes], like)


def dense(t: Translation, step: Step) -> None:
    """Gemm, and MatMul by a constant → FULLY_CONNECTED; MatMul of two activations →
    BATCH_MATMUL."""
    node = step.node
    if node.op_type == "MatMul" and not is_constant(node.inputs[1]):
        a, b = (t.codes(step, value, channels_last=False) for value in node.inputs)
        t.write(step, "BATCH_MATMUL", [a, b], Place(0, step.shape, step.grid))
        return
    turned = node.op_type == "Gemm" and bool(node.attributes.get_int("transB", 0))
    codes, scales = weights_of(node, 0 if turned else 1)
    if node.attributes.get_float("alpha", 1.0) != 1 or node.attributes.get_float("beta", 1.0) != 1:
        raise unsupported(node, "its alpha or beta is not 1")
    if node.attributes.get_int("transA", 0) or codes.ndim != 2:
        raise unsupported(node, "it is no product of rows by one matrix")
    matrix = codes if turned else np.ascontiguousarray(codes.T)
    x = t.codes(step, node.inputs[0], channels_last=False)
    if x.flattened is not None:
        matrix = _reordered(matrix, x.flattened)
    weight = t.network.constant(matrix, f"{node.name}/weight", scales, axis=0)
    t.write(
        step,
        "FULLY_CONNECTED",
        [x, weight, _bias(t, step, x, scales)],
        Place(0, step.shape, step.grid),
        keep_num_dims=len(step.shape) != 2,
    )


def takes_any_order(node: ir.Node, position: int) -> bool:
    """Whether ``dense`` can permute the features of this input in its weights."""
    return position == 0 and is_op(node, "Gemm", "MatMul") and is_constant(node.inputs[1])


def _reordered(matrix: Array, flattened: tuple[int, int, int]) -> Array:
    """[O, C·H·W] → [O, H·W·C]."""
    grouped = matrix.reshape(len(matrix), *flattened)
    return np.ascontiguousarray(grouped.transpose(0, 2, 3, 1)).reshape(matrix.shape)


def _bias(t: Translation, step: Step, x: Place, scales: Array) -> int:
    """The int32 bias [O] with scale input scale × weight scale; zeros where there is none."""
    node = step.node
    held = step.bias
    if held is None and len(node.inputs) > 2:
        held = constant_of(node.inputs[2])
        if held is None and node.inputs[2] is not None:
            raise unsupported(node, "its bias is computed")
    assert x.grid is not None
    product = np.float32(x.grid.scale) * scales
    value = np.zeros(len(scales)) if held is None else np.asarray(held, np.float64).reshape(-1)
    if len(value) != len(scales):
        raise unsupported(node, f"its bias has {len(value)} elements for {len(scales)} channels")
    codes = np.rint(value / product.astype(np.float64))
    if np.abs(codes).max(initial=0) >= 2**31:
        raise unsupported(node, "its bias overflows int32 at these scales")
    return t.network.constant(codes.astype(np.int32), f"{node.name}/bias", product)
