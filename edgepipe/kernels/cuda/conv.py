"""Convolution as an implicit matrix product: weights times patches; see ``window``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import kernel
from edgepipe.kernels.cuda import window
from edgepipe.kernels.cuda.threads import LANES, fill_border
from edgepipe.kernels.cuda.tile import Tile, choose, settings
from edgepipe.kernels.cuda.weights import arguments, packed, unsupported
from edgepipe.kernels.cuda.window import Window
from edgepipe.kernels.ops import ConvOp, Op
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


def _window(op: ConvOp, knobs: Knobs) -> Window:
    return Window(
        op, Tile.of(knobs), op.kernel, op.y.h, op.y.w, op.strides, op.dilations, op.offset,
        op.groups,
    )  # fmt: skip


def executed(op: ConvOp, knobs: Knobs) -> int:
    return _window(op, knobs).executed


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci/g, kh, kw]``, scales where there are codes, ``b[co]`` → tiles, padded vectors."""
    weight, *vectors = arrays
    size = op.y.blocks * LANES
    return [
        packed(op.weights, _window(op, knobs).pack(weight)),
        *(grown(np.asarray(v, np.float32).reshape(-1), size) for v in vectors),
    ]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    product, channels = _window(op, knobs), op.y.blocks * LANES
    inputs = [
        ("x", op.x.elements, op.x.dtype),
        *arguments(op.weights, product.elements, channels),
        ("b", channels, "float32"),
    ]

    def body(*buffers: Any) -> None:
        window.emit(
            product,
            buffers,
            lambda thread, threads: fill_border(op.y, buffers[-1], thread, threads),
        )

    kind = "pointwise" if op.kernel == (1, 1) else "conv"
    return kernel(kind, signature(op, inputs), body)


TEMPLATE = KernelTemplate(
    name="conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
)
