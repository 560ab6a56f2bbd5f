"""Own decompositions of signal and image operators with constant sizes.

1. DFT → one product with a constant matrix that holds the cosines and sines.
2. STFT → a strided convolution with windowed cosines and sines.
3. Col2Im → grouped ConvTranspose whose kernel puts every column element in its place.
4. AffineGrid → one product with the constant grid of normalised coordinates. (The function in
   the standard is wrong for batch 1: it squeezes the batch away.)
5. GlobalLpPool → ReduceL1, ReduceL2 or powers around ReduceSum.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError
from edgepipe.passes.decompose import rewrites
from edgepipe.passes.editor import Array, Editor, array_of, shape_of
from edgepipe.passes.rewrite_math import ints, like

#: Larger transform matrices are not built; the operator then stays.
MAX_MATRIX_BYTES = 64 << 20


def _check_length(node: ir.Node, length: int) -> None:
    if length < 1:
        raise UserError(f"a Fourier transform of {length} samples", where=f"node '{node.name}'",
                        fix="correct its length, or the shape of its input")  # fmt: skip


def _waves(samples: int, length: int, bins: int, parts: int, inverse: bool) -> Array:
    """Matrix [samples, parts, bins, 2] of the DFT of ``length``: parts and 2 are (real, imag)."""
    turns = np.outer(np.arange(samples), np.arange(bins)) % length
    angle = 2 * np.pi / length * turns * (1 if inverse else -1)
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.empty((samples, parts, bins, 2))
    matrix[:, 0, :, 0], matrix[:, 0, :, 1] = cosine, sine
    if parts == 2:
        matrix[:, 1, :, 0], matrix[:, 1, :, 1] = -sine, cosine
    return matrix / length if inverse else matrix


def _scalar(node: ir.Node, index: int) -> int | None:
    """The integer constant at an optional input: None if absent, -1 << 62 if not constant."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None:
        return None
    array = array_of(value)
    return _UNKNOWN if array is None else int(array.reshape(()))


_UNKNOWN = -(1 << 62)


@rewrites("DFT")
def dft(edit: Editor, node: ir.Node) -> bool:
    """Case 1. Input [..., n, ..., 1 or 2], output [..., bins, ..., 2]."""
    x, dims = node.inputs[0], shape_of(node.inputs[0])
    length, axis = _scalar(node, 1), _scalar(node, 2)
    inverse = node.attributes.get_int("inverse", 0) == 1
    onesided = node.attributes.get_int("onesided", 0) == 1
    if dims is None or _UNKNOWN in (length, axis):
        edit.note(node.name, "DFT kept: its length or axis is not constant")
        return False
    rank = len(dims)
    axis = (-2 if axis is None else axis) % rank
    parts = dims[-1]
    if inverse and onesided:
        length = 2 * (dims[axis] - 1) if length is None else length
        samples, bins, outs = min(dims[axis], length // 2 + 1), length, 1
    else:
        length = dims[axis] if length is None else length
        samples, outs = min(dims[axis], length), 2
        bins = length // 2 + 1 if onesided else length
    _check_length(node, length)
    if samples * parts * bins * 8 > MAX_MATRIX_BYTES:
        edit.note(node.name, f"DFT kept: a matrix for length {length} would be too large")
        return False
    if samples < dims[axis]:
        span = [ints(edit, [v]) for v in (0, samples, axis)]
        x = edit.insert(node, "Slice", [x, *span])
    others = [i for i in range(rank - 1) if i != axis]
    order = [*others, axis, rank - 1]
    x = edit.insert(node, "Transpose", [x], {"perm": order})
    outer = [dims[i] for i in others]
    x = edit.insert(node, "Reshape", [x, ints(edit, [*outer, samples * parts])])
    waves = _waves(samples, length, bins, parts, inverse)
    if outs == 1:
        # The bins that are not given are the conjugates of those that are.
        twice = [1 if k == 0 or 2 * k == length else 2 for k in range(samples)]
        waves = waves[..., :1] * np.array(twice).reshape(-1, 1, 1, 1)
    matrix = waves.reshape(samples * parts, bins * outs)
    y = edit.insert(node, "MatMul", [x, like(edit, matrix, x)])
    y = edit.insert(node, "Reshape", [y, ints(edit, [*outer, bins, outs])])
    back = [order.index(i) for i in range(rank)]
    edit.become(node, "Transpose", [y], {"perm": back})
    return True


@rewrites("STFT")
def stft(edit: Editor, node: ir.Node) -> bool:
    """Case 2. Signal [batch, n, 1 or 2] → [batch, frames, bins, 2]."""
    x, window = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    dims, step, given = shape_of(x), _scalar(node, 1), _scalar(node, 3)
    window_dims = shape_of(window)
    length = given if given is not None else (window_dims or (_UNKNOWN,))[0]
    if dims is None or step in (None, _UNKNOWN) or length == _UNKNOWN:
        edit.note(node.name, "STFT kept: its frame step or length is not constant")
        return False
    assert x is not None and step is not None
    _check_length(node, length)
    batch, _, parts = (*dims, 1)[:3]
    bins = length // 2 + 1 if node.attributes.get_int("onesided", 1) == 1 else length
    waves = _waves(length, length, bins, parts, False)
    kernel = like(edit, waves.transpose(2, 3, 1, 0).reshape(bins * 2, parts, length), x)
    if window is not None:
        row = edit.insert(node, "Reshape", [window, ints(edit, [1, 1, length])])
        kernel = edit.insert(node, "Mul", [kernel, row])
    signal = edit.insert(node, "Reshape", [x, ints(edit, [batch, dims[1], parts])])
    signal = edit.insert(node, "Transpose", [signal], {"perm": [0, 2, 1]})
    y = edit.insert(node, "Conv", [signal, kernel], {"strides": [step]})
    frames = (dims[1] - length) // step + 1
    y = edit.insert(node, "Reshape", [y, ints(edit, [batch, bins, 2, frames])])
    edit.become(node, "Transpose", [y], {"perm": [0, 3, 1, 2]})
    return True


@rewrites("Col2Im")
def col2im(edit: Editor, node: ir.Node) -> bool:
    """Case 3. Columns [batch, channels·block, positions] → [batch, channels, *image]."""
    dims = shape_of(node.inputs[0])
    image, block = array_of(node.inputs[1]), array_of(node.inputs[2])
    if dims is None or image is None or block is None:
        edit.note(node.name, "Col2Im kept: its sizes are not constant")
        return False
    rank, size = len(image), math.prod(block.tolist())
    strides = list(node.attributes.get_ints("strides", ()) or [1] * rank)
    dilations = list(node.attributes.get_ints("dilations", ()) or [1] * rank)
    pads = list(node.attributes.get_ints("pads", ()) or [0] * 2 * rank)
    reach = [(int(k) - 1) * d + 1 for k, d in zip(block, dilations, strict=True)]
    padded = [int(n) + pads[i] + pads[i + rank] for i, n in enumerate(image)]
    grid = [(n - r) // s + 1 for n, r, s in zip(padded, reach, strides, strict=True)]
    extra = [n - (s * (g - 1) + r) for n, s, g, r in zip(padded, strides, grid, reach, strict=True)]
    channels = dims[1] // size
    kernel = np.eye(size).reshape(1, size, *block.tolist())
    kernel = np.broadcast_to(kernel, (channels, *kernel.shape[1:])).reshape(-1, 1, *block.tolist())
    x = edit.insert(node, "Reshape", [node.inputs[0], ints(edit, [dims[0], dims[1], *grid])])
    attributes = {
        "group": channels,
        "strides": strides,
        "dilations": dilations,
        "pads": pads,
        "output_padding": extra,
    }
    edit.become(node, "ConvTranspose", [x, like(edit, kernel, x)], attributes)
    return True


@rewrites("AffineGrid")
def affine_grid(edit: Editor, node: ir.Node) -> bool:
    """Case 4. theta [batch, d, d + 1], size [batch, channels, *image] → [batch, *image, d]."""
    theta, size = node.inputs[0], array_of(node.inputs[1])
    if size is None or theta is None:
        edit.note(node.name, "AffineGrid kept: its size is not constant")
        return False
    image = [int(n) for n in size[2:]]
    aligned = node.attributes.get_int("align_corners", 0) == 1
    axes = [np.linspace(-1, 1, n) if aligned else (2 * np.arange(n) + 1) / n - 1 for n in image]
    # Coordinates are given innermost axis first: (x, y) or (x, y, z).
    places = np.stack(np.meshgrid(*axes, indexing="ij")[::-1], axis=-1).reshape(-1, len(image))
    grid = np.concatenate([places, np.ones((len(places), 1))], axis=1)
    turned = edit.insert(node, "Transpose", [theta], {"perm": [0, 2, 1]})
    product = edit.insert(node, "MatMul", [like(edit, grid, theta), turned])
    edit.become(node, "Reshape", [product, ints(edit, [int(size[0]), *image, len(image)])])
    return True


@rewrites("GlobalLpPool")
def global_lp_pool(edit: Editor, node: ir.Node) -> bool:
    """Case 5."""
    x, dims = node.inputs[0], shape_of(node.inputs[0])
    if dims is None:
        return False
    axes, p = ints(edit, list(range(2, len(dims)))), node.attributes.get_int("p", 2)
    if p in (1, 2):
        edit.become(node, f"ReduceL{p}", [x, axes], {"keepdims": 1})
        return True
    power = edit.insert(node, "Pow", [edit.insert(node, "Abs", [x]), like(edit, p, x)])
    total = edit.insert(node, "ReduceSum", [power, axes], {"keepdims": 1})
    edit.become(node, "Pow", [total, like(edit, 1 / p, x)])
    return True
