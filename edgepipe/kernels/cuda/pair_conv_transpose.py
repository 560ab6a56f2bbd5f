"""Transposed convolution in pairs of halves; see ``conv_transpose`` and ``pair_conv``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.cuda import conv_transpose, pair_conv, pairs, tile
from edgepipe.kernels.cuda.conv import padded
from edgepipe.kernels.cuda.tile import Tile
from edgepipe.kernels.cuda.weights import packed
from edgepipe.kernels.ops import ConvTransposeOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return pairs.unfit(op, target) if isinstance(op, ConvTransposeOp) else ""


def default(op: ConvTransposeOp, target: Target) -> Knobs:
    return {**conv_transpose.default(op, target), "k": pair_conv.depth(op.x, op.x.c)}


def knobs(op: ConvTransposeOp, target: Target) -> list[Knobs]:
    return tile.settings(default(op, target))


def pack(op: ConvTransposeOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[ci, co, kh, kw]``, scales where there are codes, ``b[co]`` → pairs of every phase."""
    weight, *vectors = arrays
    tiles = pair_conv.paired(conv_transpose.tiles(op, knobs, weight), Tile.of(knobs))
    return [packed(op.weights, tiles), *padded(op, pairs.scales(op.weights, vectors))]


def emit(op: ConvTransposeOp, knobs: Knobs) -> Any:
    return conv_transpose.emitted(op, knobs, pair_conv.PAIRS, "pair_")


TEMPLATE = KernelTemplate(
    name="pair_conv_transpose",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=conv_transpose.executed,
    rank=1,
    arithmetic="float16",
    accumulator=pair_conv.ACCUMULATOR,
)
