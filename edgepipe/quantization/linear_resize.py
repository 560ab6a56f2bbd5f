"""Resize nodes that interpolate linearly along height and width, in float and of codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe import bilinear
from edgepipe.quantization.graph import Array, constant, dims, is_op


def unfit(node: ir.Node) -> str | None:
    """None for a Resize that ``edgepipe.bilinear`` has tables for, the reason for another linear
    one, "" for any other node."""
    if not is_op(node, "Resize") or node.attributes.get_string("mode", "nearest") != "linear":
        return ""
    if any(node.attributes.get_int(name, 0) for name in ("antialias", "exclude_outside")):
        return "antialias or exclude_outside"
    source, result = dims(node.inputs[0]), dims(node.outputs[0])  # type: ignore[arg-type]
    if source is None or result is None or len(source) != 4 or source[:2] != result[:2]:
        return "not along height and width"
    if (mode := transform(node)) not in bilinear.TRANSFORMS:
        return mode
    # Coordinates follow the scales where they are given; the tables are made from the sizes.
    scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is not None and scales.size:
        whole = "axes" not in node.attributes
        if not whole or not np.allclose(source * scales.astype(np.float64), result, atol=1e-3):
            return "its scales do not give whole sizes"
    return None


def transform(node: ir.Node) -> str:
    """How ``node`` finds its source coordinates."""
    found = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    return str(found)


def tables(node: ir.Node) -> list[Array]:
    """Indices and weights of its rows, then of its columns."""
    source, result = dims(node.inputs[0]), dims(node.outputs[0])  # type: ignore[arg-type]
    assert source is not None and result is not None
    (h, w), (rows, columns) = source[2:], result[2:]
    return bilinear.both_tables(transform(node), (h, w), (rows, columns))


def interpolate(node: ir.Node, x: Array) -> Array:
    """What ``node`` makes of ``x`` [n, c, h, w] float32."""
    result = dims(node.outputs[0])
    assert result is not None
    return bilinear.interpolate(x, transform(node), (result[2], result[3]))
