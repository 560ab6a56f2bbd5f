"""Convolutions, pools and what else knows of space, as torch functions over batches."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch.nn import functional

from edgepipe.quantization.graph import Array, constant, dims

#: Inputs of a node in order → its output, or a list of them.
Function = Callable[..., Any]

_CONVOLUTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
_TRANSPOSED = (
    functional.conv_transpose1d,
    functional.conv_transpose2d,
    functional.conv_transpose3d,
)
_MAXIMA = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)
_AVERAGES = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}


class Refused(Exception):
    """Why an operator cannot be fine-tuned."""


def known_dims(value: ir.Value | None) -> tuple[int, ...]:
    """The static shape of an input or output."""
    shape = None if value is None else dims(value)
    if shape is None:
        raise Refused("a shape depends on the data")
    return shape


def required(node: ir.Node, index: int) -> Array:
    """The constant that an input must be."""
    array = constant(node.inputs[index] if len(node.inputs) > index else None)
    if array is None:
        raise Refused(f"its input {index} is computed")
    return array


def _ints(node: ir.Node, name: str, default: int, count: int) -> list[int]:
    return [int(v) for v in node.attributes.get_ints(name, (default,) * count)]


def _spatial_rank(node: ir.Node) -> int:
    rank = len(known_dims(node.inputs[0])) - 2
    if not 1 <= rank <= 3:
        raise Refused(f"{rank} spatial dimensions")
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise Refused("auto_pad is not resolved")
    return rank


def _torch_order(begins: list[int], ends: list[int]) -> list[int]:
    """Pads as ``functional.pad`` takes them: last axis first."""
    return [p for pair in reversed(list(zip(begins, ends, strict=True))) for p in pair]


def _convolve(node: ir.Node) -> Function:
    rank = _spatial_rank(node)
    function = _CONVOLUTIONS[rank - 1]
    strides, dilations = _ints(node, "strides", 1, rank), _ints(node, "dilations", 1, rank)
    pads = _ints(node, "pads", 0, 2 * rank)
    begins, ends = pads[:rank], pads[rank:]
    group = node.attributes.get_int("group", 1)
    even = begins == ends
    around = _torch_order(begins, ends)

    def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        padded = x if even else functional.pad(x, around)
        return function(padded, w, b, strides, begins if even else 0, dilations, group)

    return run


def _convolve_transposed(node: ir.Node) -> Function:
    rank = _spatial_rank(node)
    function = _TRANSPOSED[rank - 1]
    strides, dilations = _ints(node, "strides", 1, rank), _ints(node, "dilations", 1, rank)
    extra = _ints(node, "output_padding", 0, rank)
    pads = _ints(node, "pads", 0, 2 * rank)
    group = node.attributes.get_int("group", 1)
    # Without pads torch gives the whole scatter; what ONNX cuts off or appends comes after it.
    ends = [o - p for p, o in zip(pads[rank:], extra, strict=True)]
    around = _torch_order([-p for p in pads[:rank]], ends)

    def run(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
        whole = function(x, w, None, strides, 0, 0, group, dilations)
        cut = functional.pad(whole, around) if any(around) else whole
        return cut if b is None else cut + b.reshape(1, -1, *[1] * rank)

    return run


def _window(node: ir.Node) -> tuple[int, list[int], list[int], list[int], list[int], list[int]]:
    """Rank, kernel, strides, dilations, and pads at begin and end that reach every output.

    The pads at the end follow from the output's size, so ``ceil_mode`` needs no case.
    """
    rank = _spatial_rank(node)
    kernel, strides = _ints(node, "kernel_shape", 1, rank), _ints(node, "strides", 1, rank)
    dilations = _ints(node, "dilations", 1, rank)
    begins = _ints(node, "pads", 0, 2 * rank)[:rank]
    size, out = known_dims(node.inputs[0])[2:], known_dims(node.outputs[0])[2:]
    ends = [
        (o - 1) * s + (k - 1) * d + 1 - n - p
        for o, s, k, d, n, p in zip(out, strides, kernel, dilations, size, begins, strict=True)
    ]
    return rank, kernel, strides, dilations, begins, ends


def _max_pool(node: ir.Node) -> Function:
    if len(node.outputs) > 1:
        raise Refused("its indices are read")
    rank, kernel, strides, dilations, begins, ends = _window(node)
    function, around = _MAXIMA[rank - 1], _torch_order(begins, ends)

    def run(x: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(x, around, value=-torch.inf) if any(around) else x
        return function(padded, kernel, strides, 0, dilations)

    return run


def _average_pool(node: ir.Node) -> Function:
    rank, kernel, strides, dilations, begins, ends = _window(node)
    if any(d != 1 for d in dilations):
        raise Refused("it is dilated")
    function, around = _AVERAGES[rank - 1], _torch_order(begins, ends)
    if not any(around):
        return lambda x: function(x, kernel, strides)
    size = known_dims(node.inputs[0])[2:]
    counted = torch.ones(1, 1, *size)
    if node.attributes.get_int("count_include_pad", 0):
        given = _ints(node, "pads", 0, 2 * rank)
        inner = _torch_order(given[:rank], given[rank:])
        counted = functional.pad(counted, inner, value=1.0)
        rest = [e - g for e, g in zip(ends, given[rank:], strict=True)]
        counted = functional.pad(counted, _torch_order([0] * rank, rest))
    else:
        counted = functional.pad(counted, around)
    share = function(counted, kernel, strides)
    return lambda x: function(functional.pad(x, around), kernel, strides) / share


def _global_average(node: ir.Node) -> Function:
    axes = list(range(2, len(known_dims(node.inputs[0]))))
    return lambda x: x.mean(axes, keepdim=True)


def _pad(node: ir.Node) -> Function:
    rank = len(known_dims(node.inputs[0]))
    amounts = required(node, 1).tolist()
    given = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    axes = range(rank) if given is None else [int(a) % rank for a in given]
    begins, ends = [0] * rank, [0] * rank
    for index, axis in enumerate(axes):
        begins[axis], ends[axis] = amounts[index], amounts[index + len(amounts) // 2]
    if begins[0] or ends[0]:
        raise Refused("it pads the axis of samples")
    mode = _PAD_MODES.get(node.attributes.get_string("mode", "constant"))
    if mode is None:
        raise Refused("its mode is not known")
    fill = 0.0
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        fill = float(required(node, 2).reshape(()))
    first = 0 if mode == "constant" else 2
    if any(begins[:first]) or any(ends[:first]):
        raise Refused(f"it pads channels by {mode}")
    around = _torch_order(begins[first:], ends[first:])
    value = fill if mode == "constant" else None
    return lambda x, *_: functional.pad(x, around, mode, value)


def _resize(node: ir.Node) -> Function:
    size, out = known_dims(node.inputs[0]), known_dims(node.outputs[0])
    mode = node.attributes.get_string("mode", "nearest")
    where = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    rounding = node.attributes.get_string("nearest_mode", "round_prefer_floor")
    if size[:2] != out[:2] or any(o % n for n, o in zip(size, out, strict=True)):
        raise Refused("it does not enlarge by whole factors")
    factors = [o // n for n, o in zip(size[2:], out[2:], strict=True)]
    half = where in ("half_pixel", "pytorch_half_pixel")
    if mode == "nearest" and (
        (where == "asymmetric" and rounding == "floor")
        or (half and rounding.startswith("round_prefer"))
    ):
        return lambda x, *_: functional.interpolate(x, scale_factor=factors, mode="nearest")
    if mode == "linear" and len(factors) == 2 and (half or where == "align_corners"):
        corners = where == "align_corners"
        target = list(out[2:])
        return lambda x, *_: functional.interpolate(
            x, target, mode="bilinear", align_corners=corners
        )
    raise Refused(f"mode {mode}, {where}, {rounding}")


def _depth_to_space(node: ir.Node) -> Function:
    block = node.attributes.get_int("blocksize", 1)
    _, channels, height, width = known_dims(node.inputs[0])
    inner = channels // block**2
    if node.attributes.get_string("mode", "DCR") == "CRD":
        return lambda x: functional.pixel_shuffle(x, block)

    def run(x: torch.Tensor) -> torch.Tensor:
        split = x.reshape(-1, block, block, inner, height, width)
        return split.permute(0, 3, 4, 1, 5, 2).reshape(-1, inner, height * block, width * block)

    return run


SPATIAL: dict[str, Callable[[ir.Node], Function]] = {
    "Conv": _convolve,
    "ConvTranspose": _convolve_transposed,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average,
    "Pad": _pad,
    "Resize": _resize,
    "DepthToSpace": _depth_to_space,
}
