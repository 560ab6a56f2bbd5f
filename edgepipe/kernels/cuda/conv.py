"""Convolution as an implicit matrix product: weights times patches; see ``window``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from edgepipe.kernels.builder import kernel
from edgepipe.kernels.cuda import window
from edgepipe.kernels.cuda.threads import LANES, fill_border
from edgepipe.kernels.cuda.tile import Tile, choose, settings
from edgepipe.kernels.cuda.weights import arguments, packed, unsupported
from edgepipe.kernels.cuda.window import Operands, Window
from edgepipe.kernels.ops import ConvOp, ConvTransposeOp, Op
from edgepipe.kernels.output import signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.weights import grown
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvOp):
        return ""
    if op.y.lanes != LANES:
        return "its output is not NCHW4c"
    return unsupported(op.weights)


def default(op: ConvOp, target: Target) -> Knobs:
    pixels = op.y.n * op.y.h * op.y.w
    channels = op.y.blocks * LANES // op.groups
    assert target.cuda is not None
    return choose(channels, pixels, op.groups, target.cuda.processors).knobs()


def knobs(op: ConvOp, target: Target) -> list[Knobs]:
    return settings(default(op, target))


def window_of(op: ConvOp, tile: Tile) -> Window:
    """The product that ``op`` is, in tiles like ``tile``."""
    return Window(
        op, tile, op.kernel, op.y.h, op.y.w, op.strides, op.dilations, op.offset, op.groups
    )


def padded(op: ConvOp | ConvTransposeOp, vectors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Scales and bias with a zero for every channel past the real ones."""
    size = op.y.blocks * LANES
    return [grown(np.asarray(v, np.float32).reshape(-1), size) for v in vectors]


def executed(op: ConvOp, knobs: Knobs) -> int:
    return window_of(op, Tile.of(knobs)).executed


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]``, scales where there are codes, ``b[co]`` → tiles, padded vectors."""
    weight, *vectors = arrays
    tiles = window_of(op, Tile.of(knobs)).pack(weight)
    return [packed(op.weights, tiles), *padded(op, vectors)]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    return emitted(op, window_of(op, Tile.of(knobs)))


def emitted(op: ConvOp, product: Window, operands: Operands | None = None, prefix: str = "") -> Any:
    """The kernel of ``product``, its name behind ``prefix``; ``operands`` as in ``window.emit``."""
    channels = op.y.blocks * LANES
    inputs = [
        ("x", op.x.elements, op.x.dtype),
        *arguments(op.weights, product.elements, channels),
        ("b", channels, "float32"),
    ]

    def body(*buffers: Any) -> None:
        window.emit(product, buffers, partial(fill_border, op.y, buffers[-1]), operands)

    kind = "pointwise" if op.kernel == (1, 1) else "conv"
    return kernel(prefix + kind, signature(op, inputs), body)


TEMPLATE = KernelTemplate(
    name="conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
)
