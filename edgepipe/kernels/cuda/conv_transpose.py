"""Transposed convolution: outputs that share a position modulo the stride are one convolution.

Such a phase has the same taps everywhere, at shifts that are evenly spaced; each is a launch. No
zeros are inserted and no output is written twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import kernel
from edgepipe.kernels.cuda import window
from edgepipe.kernels.cuda.conv import padded
from edgepipe.kernels.cuda.threads import LANES, fill_border
from edgepipe.kernels.cuda.tile import Tile, choose, settings
from edgepipe.kernels.cuda.weights import arguments, packed, unsupported
from edgepipe.kernels.cuda.window import Operands, Window
from edgepipe.kernels.ops import ConvTransposeOp, Op
from edgepipe.kernels.output import signature
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, ConvTransposeOp):
        return ""
    if op.x.lanes not in (1, LANES) or op.y.lanes != LANES:
        return "it is not in NCHW4c"
    return unsupported(op.weights)


def default(op: ConvTransposeOp, target: Target) -> Knobs:
    assert target.cuda is not None
    (sy, sx), y = op.strides, op.y
    pixels = y.n * -(-y.h // sy) * -(-y.w // sx)
    return choose(y.blocks * LANES, pixels, 1, target.cuda.processors).knobs()


def knobs(op: ConvTransposeOp, target: Target) -> list[Knobs]:
    return settings(default(op, target))


def _axis(op: ConvTransposeOp, axis: int, phase: int) -> tuple[list[int], int, int]:
    """Taps of a phase along an axis, in the order of the inputs that they read; the shift of the
    first input, and the distance between two."""
    found = sorted((shift, tap) for tap, shift in op.taps(axis, phase))
    shifts = [shift for shift, _ in found]
    distance = shifts[1] - shifts[0] if len(shifts) > 1 else 1
    return [tap for _, tap in found], shifts[0] if shifts else 0, distance


def _phases(op: ConvTransposeOp, knobs: Knobs) -> list[tuple[Window, list[int], list[int]]]:
    """The product of each phase, and the taps (rows, columns of the weight) that it takes."""
    found, first = [], 0
    for py in range(min(op.strides[0], op.y.h)):
        for px in range(min(op.strides[1], op.y.w)):
            (down, top, dy), (across, left, dx) = _axis(op, 0, py), _axis(op, 1, px)
            if not down or not across:
                down, across = [], []  # the bias alone
            phase = Window(
                op,
                Tile.of(knobs),
                (len(down), len(across)),
                -(-(op.y.h - py) // op.strides[0]),
                -(-(op.y.w - px) // op.strides[1]),
                dilations=(dy, dx),
                offset=(-top, -left),
                spacing=op.strides,
                phase=(py, px),
                first=first,
            )
            found.append((phase, down, across))
            first += phase.elements
    return found


def executed(op: ConvTransposeOp, knobs: Knobs) -> int:
    return sum(phase.executed for phase, _, _ in _phases(op, knobs))


def pack(op: ConvTransposeOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[ci, co, kh, kw]``, scales where there are codes, ``b[co]`` → tiles of every phase."""
    weight, *vectors = arrays
    return [packed(op.weights, tiles(op, knobs, weight)), *padded(op, vectors)]


def tiles(op: ConvTransposeOp, knobs: Knobs, weight: np.ndarray) -> np.ndarray:
    """``w[ci, co, kh, kw]`` → the tiles of every phase, flat."""
    turned = weight.transpose(1, 0, 2, 3)
    parts = [
        phase.pack(turned[:, :, down][:, :, :, across])
        for phase, down, across in _phases(op, knobs)
        if down
    ]
    return np.concatenate(parts)


def emit(op: ConvTransposeOp, knobs: Knobs) -> Any:
    return emitted(op, knobs)


def emitted(
    op: ConvTransposeOp, knobs: Knobs, operands: Operands | None = None, prefix: str = ""
) -> Any:
    """The kernel, its name behind ``prefix``; ``operands`` as in ``window.emit``."""
    phases, channels = [phase for phase, _, _ in _phases(op, knobs)], op.y.blocks * LANES
    inputs = [
        ("x", op.x.elements, op.x.dtype),
        *arguments(op.weights, sum(p.elements for p in phases), channels),
        ("b", channels, "float32"),
    ]

    def body(*buffers: Any) -> None:
        def border(thread: Any, threads: int) -> None:
            fill_border(op.y, buffers[-1], thread, threads)

        for phase in phases:
            after = border if phase is phases[-1] else lambda thread, threads: None
            window.emit(phase, buffers, after, operands)

    return kernel(prefix + "conv_transpose", signature(op, inputs), body)


TEMPLATE = KernelTemplate(
    name="conv_transpose",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    knobs=knobs,
    executed=executed,
)
