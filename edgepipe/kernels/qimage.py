"""Convolution of the codes of an image, one to four channels, on Arm without dot products.

Products of bytes want sixteen of them in a row; a row of taps has four to twelve, and one channel
of four is none. Here channels of output lie in a vector, and every input is an element of one: a
product of four costs an instruction (SMLAL by element), as in float32, and none is of zeros.
Inputs of a row, which neighbouring pixels share, are widened once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, kernel, load, loop
from edgepipe.kernels.dot import half
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qconv_geometry import Geometry
from edgepipe.kernels.qconv_tile import Emission
from edgepipe.kernels.qproduct import arguments, vectors
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Channels of a register tile: the bytes of a vector.
WIDTH = 16
_BY_ELEMENT = dot.Dot("element", 4, 1, 1, True)


def matches(op: Any, target: Target) -> str | None:
    if not isinstance(op, QConvOp) or target.integer.dot != "mlal":
        return ""
    if op.x.c > 4 or op.x.blocks > 1 or op.groups > 1 or op.kernel == (1, 1) or op.stored:
        return ""
    if target.arch == "arm" and op.x.lanes > 1:  # sixteen registers: up to a fifth slower than sums
        return "it has more than one channel"
    if op.bits != 8 or op.dilations != (1, 1):
        return "it has dilations or weights of 4 bits"
    if op.y.dtype == "float32" or op.y.lanes % WIDTH or op.y.blocks > 1:
        return f"its outputs are no codes of channels that fill vectors of {WIDTH}"
    if any(r.layout.lanes < op.y.lanes for r in op.residuals):
        return "what is added has fewer channels"
    if _row(op, min(_most(op, target), op.y.w)) < _least(target):
        return f"the inputs of a row do not fill a vector of {_least(target)}"
    return None


def _most(op: QConvOp, target: Target) -> int:
    """Pixels of a register tile that the registers have room for, beside the inputs of a row."""
    if target.simd.registers < 32:
        return 3
    return 6 if op.x.lanes == 1 else 5


def _least(target: Target) -> int:
    """The shortest vector of inputs: short tiles have short rows."""
    return 4 if target.simd.registers < 32 else 8


def _row(op: QConvOp, pixels: int) -> int:
    """Codes of a row of the input under so many pixels."""
    return ((pixels - 1) * op.strides[1] + op.kernel[1]) * op.x.lanes


def default(op: QConvOp, target: Target) -> Knobs:
    most, least = min(_most(op, target), op.y.w), _least(target)
    rest = _row(op, 1) >= least  # whether a narrower last tile has inputs enough
    tiles = range(max(1, most - 1), most + 1) if rest else [most]
    pixels = min((p for p in tiles if _row(op, p) >= least), key=lambda p: (-(-op.y.w // p), p))
    return {"pixels": pixels, "groups": WIDTH // 4, "flat": False, "arch": target.arch,
            "apart": target.arch == "aarch64", "rest": rest, "offset": 0}  # fmt: skip


class _Tiles(Geometry):
    """What the loops of ``Emission`` ask for; the runs of its products are not these."""

    def __init__(self, op: QConvOp) -> None:
        self.op, self.dot, self.word, self.strip = op, _BY_ELEMENT, 0, 0
        self.channels, self.width, self.tiles = op.y.lanes, WIDTH, op.y.lanes // WIDTH


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, kh, kw]`` int8, ``b[co]`` int32, ``m[co]`` float32 →
    ``[tile][kh][kw][ci][16]``, bias and multipliers."""
    weight = arrays[0]
    co, ci, kh, kw = weight.shape
    grown = np.zeros((op.y.lanes, ci, kh, kw), np.int8)
    grown[:co] = weight
    packed = grown.reshape(-1, WIDTH, ci, kh, kw).transpose(0, 3, 4, 2, 1)
    return [np.ascontiguousarray(packed), *vectors(op, arrays, op.y.lanes)]


def taps(op: QConvOp) -> int:
    """Products of an output."""
    return op.kernel[0] * op.kernel[1] * op.x.c


def instructions(op: QConvOp, target: Target, end: float) -> float:
    """Vector instructions by the register tiles; the end of a vector of sums takes ``end``."""
    knobs = default(op, target)
    pixels, groups = knobs["pixels"], knobs["groups"]
    rows = op.y.n * op.y.h * -(-op.y.w // pixels) * (op.y.lanes // WIDTH)
    reads = op.kernel[0] * -(-_row(op, pixels) // 8) * 2
    return float(rows * (taps(op) * (pixels * groups + 3) + reads + pixels * groups * end))


def emit(op: QConvOp, knobs: Knobs) -> Any:
    buffers = arguments(op, (op.y.lanes * taps(op), "int8"), op.y.lanes)
    return kernel("q_image", buffers, lambda *held: _Image(op, knobs, held).run())


class _Image(Emission):
    """One such kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        super().__init__(op, knobs, _Tiles(op), buffers)

    def accumulate(self, acc: Registers, *at: Any) -> None:
        """Sum over the rows of taps."""
        op, arch = self.op, self.knobs["arch"]
        length, (_, tile, _, _) = _row(op, self.pixels), at
        lanes = 8 if length >= 8 else 4
        # The last vector is moved back, not to read past what is the row's.
        starts = [min(first, length - lanes) for first in range(0, length, lanes)]
        with loop(op.kernel[0]) as ky:
            place = T.bind(self.input_offset(at, (0, ky, 0), 0))
            first = T.bind((tile * op.kernel[0] + ky) * (op.kernel[1] * op.x.c * WIDTH))
            inputs = Registers(len(starts), lanes, "int16")
            for k, start in enumerate(starts):
                inputs[k] = tirx.Cast(f"int16x{lanes}", load(self.source, place + start, lanes))
            for kx in range(op.kernel[1]):
                for c in range(op.x.c):
                    row = load(self.weights, first + (kx * op.x.c + c) * WIDTH, WIDTH)
                    wide = Registers(2, 8, "int16")
                    for which in range(2):
                        wide[which] = tirx.Cast("int16x8", half(row, WIDTH, which))
                    for i in range(self.pixels):
                        code = (i * op.strides[1] + kx) * op.x.lanes + c
                        scalar = inputs.lane(code // lanes, code - starts[code // lanes])
                        for j in range(self.groups):
                            r, four = i * self.groups + j, half(wide[j // 2], 8, j % 2)
                            acc[r] = dot.add_long(arch, acc[r], four, scalar)


TEMPLATE = KernelTemplate(
    name="q_image",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    rank=2,
    arithmetic="int8",
    accumulator="int32",
)
