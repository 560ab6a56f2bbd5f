"""What a convolution of codes costs dense and over its blocks, so that the cheaper can be chosen.

Vector instructions per inference, counted from the register tiles: an estimate, to compare forms
on one target with, and no latency.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from edgepipe.kernels import qconv, qimage, qsparse, qsparse_gemv, qwinograd
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qconv_geometry import Geometry
from edgepipe.kernels.relaxed import whole
from edgepipe.kernels.sparse import GATHERED
from edgepipe.kernels.sparse_cost import reading
from edgepipe.kernels.template import Knobs
from edgepipe.target import Target

#: Instructions of one accumulation, by way of summing; a relaxed dot product is one on Arm and
#: with AVX-VNNI, and three on other x86-64.
_SUMS = {"vnni": 1, "sdot": 1, "maddubs": 3, "pairs": 2, "mlal": 8, "relaxed": 2}
#: The dense kernel of "mlal" sums sixteen products of a channel at a time, by two multiplications
#: and one addition of pairs.
_DENSE_SUMS = {**_SUMS, "mlal": 3}
#: Instructions that pack four inputs of a pixel: half a load that widens, a shuffle and a store.
_PACKING = 1.5
#: Instructions that end four sums, their stores and a share of the residual among them.
_END = 10
#: Instructions that turn sixteen codes of a channel back, their share of those of sixteen channels.
_TURN = 8
#: What a list of blocks costs beside them: its loop, and a branch that is predicted wrong.
_LIST = 16


def _knobs(template: Any, op: QConvOp, target: Target) -> Knobs:
    """Those that run where the target's variants do."""
    knobs: Knobs = template.default(op, target)
    for name in target.variants:
        knobs = template.variant(op, knobs, name) or knobs
    return knobs


def dense(op: QConvOp, target: Target) -> int:
    """The dense kernel, whatever ``op.stored`` says."""
    plain = replace(op, stored=0)
    for template in qwinograd, qimage:
        if template.matches(plain, target) is None:
            return int(template.instructions(plain, target, _END))
    knobs = _knobs(qconv.TEMPLATE, op, target)
    g, pixels, groups = Geometry(op, knobs), knobs["pixels"], knobs["groups"]
    if g.dot.name == "relaxed":
        pixels, groups = knobs["relaxed"], g.stored
    rows, columns = (1, op.y.h * op.y.w) if knobs["flat"] else (op.y.h, op.y.w)
    tiles = op.y.n * rows * -(-columns // pixels) * g.tiles * (g.stored // groups)
    parts, way = g.dot.parts, g.dot.name
    # Inputs packed as int16 are loaded as they are, and WebAssembly widens what it loads.
    widened = 2 if way == "pairs" and not g.strip else 1
    step = groups * parts * (pixels * _DENSE_SUMS[way] + widened) + pixels * widened
    packing = op.y.n * rows * columns * g.runs * g.steps * _PACKING if g.strip else 0
    end = pixels * groups * (_END * g.dot.lanes / 4 / _wide(g.dot.lanes) + parts - 1)
    weights = op.x.c * op.y.c
    read = reading(weights, weights) if qsparse.one_pixel(op) else 0
    return int(tiles * (g.runs * g.steps * step + end) + packing + read)


def blocks(op: QConvOp, target: Target) -> int:
    """The kernel over ``op.stored`` blocks."""
    if qsparse.one_pixel(op):
        return _gathered(op, target)
    knobs = _knobs(qsparse.TEMPLATE, op, target)
    lanes, vectors = knobs["lanes"], knobs["vectors"]
    pairs, apart = knobs["dot"] == "pairs", knobs["dot"] == "relaxed" and not whole(op.limit)
    pixels, channels = vectors * lanes, op.y.lanes * op.y.blocks
    tiles = op.y.n * -(-op.y.h * op.y.w // pixels)
    # A load, what sums, and where weights are magnitudes what complements inputs.
    each = vectors * (2 if pairs else 1) * (1 + _SUMS[knobs["dot"]] + apart)
    taps = qsparse.places_of(op) * pixels / 4 * 3
    end = vectors * 3 + pixels / 4 * (_END + 3)
    if qsparse.direct(op, pixels):
        end = vectors * (4 + lanes / 4) + pixels / 16 * _TURN
    return int(tiles * (taps + op.stored * (each + 5) + channels * (_LIST + end)))


def _gathered(op: QConvOp, target: Target) -> int:
    """The kernel over blocks that gathers what they are multiplied with, and reading them."""
    way = _knobs(qsparse_gemv.TEMPLATE, op, target)["dot"]
    sums = 2 * (_SUMS[way] + 1) if way in ("relaxed", "pairs") else _SUMS[way]
    each = 2 * GATHERED + sums + 3  # per block its place and its input
    read = op.stored * (qsparse.BLOCK + np.dtype(qsparse.place_dtype(op)).itemsize)
    instructions = op.stored // GATHERED * each + op.y.c * (_LIST + _END)
    return int(instructions + reading(read, op.x.c * op.y.c))


def _wide(lanes: int) -> int:
    """Vectors of four in the registers that end a sum of ``lanes``."""
    return 2 if lanes > 4 else 1
