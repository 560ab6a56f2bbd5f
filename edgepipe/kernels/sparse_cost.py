"""What the inner loops of a layer cost in each form, so that the cheapest can be chosen.

Vector instructions per inference, counted from the register tiles: an estimate, to compare forms
on one target with, and no latency. Dense layers of one row wait for their weights; bytes that they
read count as instructions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgepipe.kernels import conv_tile, sparse_gemv, sparse_rows, sparse_shared, winograd
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, MatmulOp
from edgepipe.kernels.sparse import GATHERED, Sparse
from edgepipe.target import Target

#: Instructions that a core could do while it reads a byte that no cache holds: 4 MB of a dense
#: layer of one row take 0.4 ms on the x86-64 of the measurements, a fifth of its weights 0.19.
_A_BYTE = 0.5
#: Bytes of dense weights below which they are taken to stay in a cache from inference to inference.
_CACHED = 1_000_000


def reading(stored: int, dense: int) -> float:
    """What reading ``stored`` bytes of weights costs that one pixel, or row, alone needs; all of
    them are ``dense`` bytes."""
    return _A_BYTE * stored if dense >= _CACHED else 0.0


def _products(target: Target) -> int:
    """Instructions of one multiply-add."""
    return 1 if target.simd.fma else 2


def _broadcasts(target: Target) -> int:
    """Instructions of a scalar in all lanes: none where a multiply-add broadcasts by itself."""
    return 0 if target.simd.lanes_f32 == 16 else 1


def _scattered(target: Target) -> int:
    """Instructions of reading an input where the pattern says. Half a line of AVX2's 32 KB of
    first-level cache, which the next place does not use, costs another one: with it, estimates
    put the forms into the order in which they were measured."""
    return 2 if target.arch == "x86_64" and target.simd.lanes_f32 == 8 else 1


def _of_one_pixel(op: ConvOp, stored: int) -> float:
    """Reading ``stored`` bytes of weights, where there is one pixel."""
    dense = 4 * op.y.c * op.x.c * op.kernel[0] * op.kernel[1]
    return reading(stored, dense) if op.y.n * op.y.h * op.y.w == 1 else 0.0


def dense(op: ConvOp, target: Target) -> int:
    """The dense kernel, whatever ``op.sparse`` says."""
    if winograd.matches(replace(op, sparse=None), target) is None:
        return int(winograd.instructions(op, target, _products(target), _broadcasts(target)))
    knobs = conv_tile.default(op, target)
    pixels, blocks = knobs["pixels"], knobs["blocks"]
    columns, rows = (op.y.h * op.y.w, 1) if knobs["flat"] else (op.y.w, op.y.h)
    tiles = -(-columns // pixels) * rows * (op.y.blocks // blocks) * op.y.n
    places = -(-op.x.c // op.x.lanes) * op.x.lanes * op.kernel[0] * op.kernel[1]
    scalars = pixels / op.x.lanes if knobs["by_element"] else pixels * _broadcasts(target)
    each = places * (pixels * blocks * _products(target) + blocks + scalars)
    return int(tiles * (each + pixels * blocks) + _of_one_pixel(op, 4 * places * op.y.c))


def shared(op: ConvOp, sparse: Sparse, target: Target) -> int:
    """The kernel over places that the channels of a tile share."""
    knobs = sparse_shared.default(replace(op, sparse=sparse), target)
    pixels, blocks = knobs["pixels"], knobs["blocks"]
    columns, rows = (op.y.h * op.y.w, 1) if knobs["flat"] else (op.y.w, op.y.h)
    tiles = -(-columns // pixels) * rows * op.y.n
    scalars = pixels * _broadcasts(target) * _scattered(target)
    loads = blocks + scalars + 4  # the offset, and the loop
    each = sparse.places * (pixels * blocks * _products(target) + loads)
    ends = -(-op.y.c // sparse.width) * (pixels * blocks + 8)
    return int(tiles * (each + ends) + _of_one_pixel(op, 4 * sparse.weights + 4 * sparse.places))


def rows(op: ConvOp, sparse: Sparse, target: Target) -> int:
    """The kernel over planes."""
    found = sparse_rows.cut(replace(op, sparse=sparse), target)
    tiles = found.tiles[0] * found.tiles[1] * op.y.n
    loads = found.count * _scattered(target) + 6
    each = sparse.places * (found.count * _products(target) + loads)
    return int(
        tiles * (each + op.y.c * (2 * found.count + 10)) + _of_one_pixel(op, 5 * sparse.places)
    )


def dense_row(op: MatmulOp, target: Target) -> int:
    """The dense kernel of a dense layer of one row, and reading its weights."""
    vectors = -(-op.n // target.simd.lanes_f32) * op.k
    weights = 4 * op.k * op.n
    return int(vectors * (_products(target) + 1) + reading(weights, weights))


def gathered(op: MatmulOp, sparse: Sparse, target: Target) -> int:
    """The kernel over gathered inputs, and reading its weights and places."""
    each = 2 * GATHERED + _products(target) + 3  # per place its number and its input
    read = sparse.places * (4 + np.dtype(sparse_gemv.place_dtype(op)).itemsize)
    instructions = sparse.places // GATHERED * each + op.n * 10
    return int(instructions + reading(read, 4 * op.k * op.n))


def relayout(layout: Blocked, target: Target) -> int:
    """Between blocks of channels and planes: a load, a transposition and a store per vector."""
    return 3 * layout.n * layout.c * layout.h * layout.w // target.simd.lanes_f32
