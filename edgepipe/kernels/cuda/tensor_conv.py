"""Convolution of halves on tensor cores, as an implicit matrix product; see ``window``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import load, store
from edgepipe.kernels.cuda import conv, tensor
from edgepipe.kernels.cuda.tensor import LEAST_SM, SIDE, TensorTile
from edgepipe.kernels.cuda.threads import LANES
from edgepipe.kernels.cuda.tile import copied, spread
from edgepipe.kernels.cuda.weights import packed
from edgepipe.kernels.cuda.window import Operands, Window, vector_offset
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    assert target.cuda is not None
    if not isinstance(op, ConvOp) or target.cuda.sm < LEAST_SM:
        return ""
    if op.x.dtype != "float16" or op.weights.kind != "float16":
        return ""
    if op.x.lanes != LANES or op.y.lanes != LANES or op.groups > 1:
        return "grouped, or not in NCHW4c"
    return None


def default(op: ConvOp, target: Target) -> Knobs:
    assert target.cuda is not None
    pixels = op.y.n * op.y.h * op.y.w
    knobs = tensor.choose(op.y.blocks * LANES, pixels, target.cuda.processors).knobs()
    # Half the depth where the channels of a tap end in the first half of a step.
    short = 0 < op.x.c % knobs["k"] <= SIDE
    return {**knobs, "k": SIDE} if short else knobs


def knobs(op: ConvOp, target: Target) -> list[Knobs]:
    k = default(op, target)["k"]  # it orders the sums
    return [{**tile.knobs(), "k": k} for tile in tensor.CHOICES]


def executed(op: ConvOp, knobs: Knobs) -> int:
    return conv.window_of(op, TensorTile.of(knobs)).executed


def pack(op: ConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, kh, kw]``, ``b[co]`` → tiles, padded vector."""
    weight, bias = arrays
    tiles = conv.window_of(op, TensorTile.of(knobs)).pack(weight)
    return [packed(op.weights, tiles), *conv.padded(op, [bias])]


def emit(op: ConvOp, knobs: Knobs) -> Any:
    return conv.emitted(op, conv.window_of(op, TensorTile.of(knobs)), HALVES, "tensor_")


def _weights(window: Window, buffer: Any, first: Any, left: Any, thread: Any) -> None:
    copied(window.tile, buffer, first, left, thread)


def _inputs(window: Window, source: Any, at: Any, step: Any, right: Any, thread: Any) -> None:
    """The rows of a pixel lie side by side."""
    tile = window.tile

    def visit(i: Any) -> None:
        pixel, part = i % tile.bn, i // tile.bn
        vector = load(source, vector_offset(window, at, step, pixel, part), LANES)
        store(right, pixel * tile.k + part * LANES, vector, LANES)

    spread(window.per_step * tile.bn, tile.threads, thread, visit)


#: Halves as they are.
HALVES = Operands(_weights, _inputs, tensor.product)

TEMPLATE = KernelTemplate(
    name="tensor_conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
    rank=2,
    arithmetic="float16",
)
