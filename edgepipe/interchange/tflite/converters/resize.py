"""Resize: nearest and linear, where tflite picks the same source pixels.

ONNX has a dozen ways to say which pixel of the input an output pixel comes from, tflite three.
So both are computed, and the way of tflite is taken that agrees in every row and column.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgepipe.interchange.tflite.layout import Place
from edgepipe.interchange.tflite.network import Array
from edgepipe.interchange.tflite.reading import unsupported
from edgepipe.interchange.tflite.translation import Step, Translation, parameter

#: Rounding of coordinates by ONNX's ``nearest_mode``.
ROUNDING: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}
#: (align_corners, half_pixel_centers)
WAYS = ((False, False), (False, True), (True, False))


def resize(t: Translation, step: Step) -> None:
    """RESIZE_NEAREST_NEIGHBOR or RESIZE_BILINEAR, on the input's grid."""
    node = step.node
    mode = node.attributes.get_string("mode", "nearest")
    x = t.read(node.inputs[0], channels_last=True)
    if len(x.shape) != 4 or x.shape[:2] != step.shape[:2]:
        raise unsupported(node, "only height and width of images are resized there")
    if mode not in ("nearest", "linear") or node.attributes.get_int("antialias", 0) != 0:
        raise unsupported(node, f"its mode is {mode}, or it smoothes")
    if node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise unsupported(node, "it keeps the aspect ratio")
    scales = parameter(step, 2, "scales")
    wanted = []
    for axis in (2, 3):
        n, m = x.shape[axis], step.shape[axis]
        explicit = scales is not None and scales.size
        factor = float(scales.reshape(-1)[axis - 4]) if scales is not None and explicit else m / n
        wanted.append(_onnx(node, n, m, factor, mode))
    kind = "RESIZE_NEAREST_NEIGHBOR" if mode == "nearest" else "RESIZE_BILINEAR"
    size = t.network.integers(step.shape[2:], "size")
    for align, half in WAYS:
        offered = [
            _tflite(n, m, align, half, mode)
            for n, m in zip(x.shape[2:], step.shape[2:], strict=True)
        ]
        if all(np.allclose(a, b, atol=1e-4) for a, b in zip(wanted, offered, strict=True)):
            like = Place(0, step.shape, x.grid, True)
            t.write(step, kind, [x, size], like, align_corners=align, half_pixel_centers=half)
            return
    way = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    raise unsupported(node, f"no tflite resize takes its source pixels as '{way}' does")


def _onnx(node: ir.Node, n: int, m: int, factor: float, mode: str) -> Array:
    """Source coordinates [m] of an axis, rounded for nearest, by the ONNX specification."""
    way = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    i = np.arange(m, dtype=np.float64)
    if way in ("half_pixel", "pytorch_half_pixel", "half_pixel_symmetric"):
        x = (i + 0.5) / factor - 0.5
        if way == "pytorch_half_pixel" and m == 1:
            x = np.zeros(1)
        if way == "half_pixel_symmetric":
            x = x + n / 2 * (1 - m / (n * factor))
    elif way == "align_corners":
        x = i * (n - 1) / (m - 1) if m > 1 else np.zeros(1)
    elif way == "asymmetric":
        x = i / factor
    else:
        raise unsupported(node, f"its coordinates are '{way}'")
    if mode == "nearest":
        x = ROUNDING[node.attributes.get_string("nearest_mode", "round_prefer_floor")](x)
    clipped: Array = np.clip(x, 0, n - 1)
    return clipped


def _tflite(n: int, m: int, align: bool, half: bool, mode: str) -> Array:
    """Source coordinates [m] of an axis as the tflite kernels compute them."""
    factor = np.float32((n - 1) / (m - 1)) if align and m > 1 else np.float32(n / m)
    i = np.arange(m, dtype=np.float32)
    if mode == "nearest":
        x = (i + np.float32(0.5 if half else 0)) * factor
        x = np.floor(x + np.float32(0.5)) if align else np.floor(x)
    else:
        x = (i + np.float32(0.5)) * factor - np.float32(0.5) if half else i * factor
    clipped: Array = np.clip(x, 0, n - 1)
    return clipped
