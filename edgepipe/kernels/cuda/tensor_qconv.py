"""Convolution and dense layers of codes on tensor cores: the words of ``qconv`` in squares of 16
rows by 16 bytes, summed in int32, with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from tvm import tirx

from edgepipe.kernels.builder import kernel, store
from edgepipe.kernels.cuda import qconv, tensor
from edgepipe.kernels.cuda.qconv import Shape, gathered
from edgepipe.kernels.cuda.tensor import BYTES, LEAST_BYTES_SM, SIDE, TensorTile
from edgepipe.kernels.cuda.threads import LANES, fill_border
from edgepipe.kernels.cuda.tile import copied, spread
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, vectors
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Words of a step.
DEPTH = 16


def matches(op: Any, target: Target) -> str | None:
    assert target.cuda is not None
    if not isinstance(op, QConvOp) or op.depthwise or target.cuda.sm < LEAST_BYTES_SM:
        return ""
    if op.groups > 1 or op.y.c < SIDE:
        return "grouped, or fewer channels than a square has"
    return qconv.unfit(op, target)


def default(op: QConvOp, target: Target) -> Knobs:
    assert target.cuda is not None
    pixels = op.y.n * op.y.h * op.y.w
    tile = tensor.choose(op.y.lanes * op.y.blocks, pixels, target.cuda.processors)
    depth = Shape(op, tile).depth
    # Half the depth where the last step would be half empty.
    short = 0 < depth % DEPTH <= DEPTH // 2
    return {**tile.knobs(), "k": DEPTH // 2 if short else DEPTH}


def knobs(op: QConvOp, target: Target) -> list[Knobs]:
    return [{**tile.knobs(), "k": k} for tile in tensor.CHOICES for k in (DEPTH, DEPTH // 2)]


def executed(op: QConvOp, knobs: Knobs) -> int:
    return Shape(op, TensorTile.of(knobs)).executed


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """As ``qconv``; words ``[tile][step][k / 4][bm][4]``."""
    shape = Shape(op, TensorTile.of(knobs))
    tile = shape.tile
    words = qconv.rows(shape, arrays[0])
    cut = words.reshape(shape.tiles, tile.bm, shape.steps, tile.k // LANES, LANES)
    packed = np.ascontiguousarray(cut.transpose(0, 2, 3, 1, 4)).reshape(-1)
    return [packed, *vectors(op, arrays, op.y.lanes * op.y.blocks)]


def emit(op: QConvOp, knobs: Knobs) -> Any:
    shape = Shape(op, TensorTile.of(knobs))
    buffers = arguments(op, (shape.elements, "int32"), op.y.lanes * op.y.blocks)
    kind = "q_tensor_pointwise" if op.kernel == (1, 1) else "q_tensor_conv"
    return kernel(kind, buffers, lambda *held: _emit(shape, held))


def _emit(shape: Shape, buffers: Sequence[Any]) -> None:
    tile = shape.tile
    source, weights = buffers[:2]

    def fill(at: Any, step: Any, left: Any, right: Any, thread: Any) -> None:
        first = (at[1] * shape.steps + step) * (tile.k * tile.bm)

        def activation(i: Any) -> None:
            part, pixel = i // (tile.bn * LANES), i // LANES % tile.bn
            depth = step * tile.k + part * LANES + i % LANES
            if shape.depth % tile.k:
                depth = tirx.min(depth, shape.depth - 1)  # its weights are zero
            store(right, i, gathered(shape, source, at, pixel, depth), 1)

        copied(tile, weights, first, left, thread)
        spread(tile.k * tile.bn, tile.threads, thread, activation)

    blocks = (-(-shape.pixels // tile.bn), shape.tiles, 1)
    border = partial(fill_border, shape.op.y, buffers[-1])
    finish = qconv.finisher(shape, buffers)
    tensor.product(tile, blocks, shape.steps, fill, finish, border, BYTES)


TEMPLATE = KernelTemplate(
    name="q_tensor_conv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
    rank=1,
    arithmetic="int8",
    accumulator="int32",
)
