"""A layer of codes over one pixel, by the blocks of its weights that are not zero: a classifier.

With one pixel the lanes of a vector are blocks: four of an output channel are multiplied at a time
with the words of the input that they name. A channel's last blocks may be fillers of zero. Sums are
those of ``qconv``, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels import dot
from edgepipe.kernels.builder import Registers, kernel, load, parallel, splat
from edgepipe.kernels.builder import zero_border as write_border
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.qproduct import arguments, finished, vectors
from edgepipe.kernels.qsparse import BLOCK, one_pixel, place_dtype, rows_of
from edgepipe.kernels.requantize import put
from edgepipe.kernels.sparse import GATHERED, pack_gathered
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target

#: Bytes of weights that are multiplied at a time.
_BYTES = GATHERED * BLOCK


def matches(op: Any, target: Target) -> str | None:
    return None if isinstance(op, QConvOp) and op.stored and one_pixel(op) else ""


def blocks(weight: np.ndarray) -> int:
    """How many blocks of ``w[co, ci, 1, 1]`` are stored, fillers among them."""
    return len(_packed(weight, weight.shape[1])[0])


def _packed(weight: np.ndarray, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, starts in groups of ``GATHERED``, and blocks ``[stored, 4]``."""
    rows = rows_of(weight, -(-lanes // BLOCK) * BLOCK)
    words = np.ascontiguousarray(rows).view(np.int32)[..., 0]
    places, starts, stored = pack_gathered(words)
    return places, starts, stored[:, None].view(np.int8)


def default(op: QConvOp, target: Target) -> Knobs:
    chosen = dot.choose(target, op.limit, op.y.c)
    return {"dot": chosen.name, "signed": chosen.signed, "arch": target.arch}


def variant(op: QConvOp, knobs: Knobs, name: str) -> Knobs | None:
    """Relaxed dot products: weights of either sign by themselves have seven bits."""
    return {**knobs, "dot": "relaxed"} if name == "relaxed" else None


def pack(op: QConvOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[co, ci, 1, 1]`` int8, ``b[co]`` int32, ``m[co]`` float32 → blocks, bias, multipliers, the
    places of blocks, and where each output channel starts."""
    channels = _channels(op)
    places, starts, stored = _packed(arrays[0], op.x.lanes)
    starts = np.pad(starts, (0, channels - op.y.c), "edge")
    return [stored, *vectors(op, arrays, channels), places.astype(place_dtype(op)), starts]


def _channels(op: QConvOp) -> int:
    """Output channels, those that fill up a block among them."""
    return op.y.lanes * op.y.blocks


def emit(op: QConvOp, knobs: Knobs) -> Any:
    held = arguments(op, (op.stored * BLOCK, "int8"), _channels(op))
    lists = [("places", op.stored, place_dtype(op)), ("starts", _channels(op) + 1, "int32")]
    return kernel(
        "q_sparse_gemv", [*held[:4], *lists, *held[4:]], lambda *b: _Emission(op, knobs, b).run()
    )


class _Emission:
    """One kernel being emitted."""

    def __init__(self, op: QConvOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
        self.op, self.knobs = op, knobs
        name = knobs["dot"]
        # Lanes of a whole group; products of int16 take eight bytes an instruction in WebAssembly.
        lanes = 8 if name == "pairs" and knobs["arch"] == "x86_64" else 4
        self.dot = dot.named(name, lanes, knobs["signed"])
        self.source, self.weights, self.bias, self.multipliers, self.list, self.starts, *rest = (
            buffers
        )
        *self.residuals, self.target = rest

    def run(self) -> None:
        op, lanes = self.op, self.dot.lanes
        signs = 2 if self.dot.name == "relaxed" else 1
        with parallel(_channels(op)) as channel:
            acc = Registers(signs, lanes, "int32")
            for sign in range(signs):
                acc[sign] = splat(tirx.const(0, "int32"), lanes)
            first = self.starts[channel]
            with T.serial(0, self.starts[channel + 1] - first) as group:
                self.group(acc, (first + group) * GATHERED)
            total = self.bias[channel]
            for lane in range(lanes):
                total = total + acc.lane(0, lane)
            if signs == 2:
                for lane in range(lanes):
                    total = total - acc.lane(1, lane)
            place = (0, 0, 0)
            value = finished(op, total, self.multipliers, self.residuals, place, channel, 1)
            put(self.target, op.y, place, channel, [value], op.limits, self.knobs["arch"], 1)
        write_border(op.y, self.target)

    def group(self, acc: Registers, number: Any) -> None:
        """The four blocks from ``number`` on."""
        top, left = self.op.offset
        begin = self.op.x.offset(0, 0, -top, -left)
        words = []
        for i in range(GATHERED):
            at = begin + tirx.Cast("int32", self.list[number + i]) * BLOCK
            words.append(dot.reinterpret("int32", load(self.source, at, BLOCK)))
        kind = self.op.x.dtype if self.dot.name == "pairs" else "int8"
        x = dot.reinterpret(f"{kind}x{_BYTES}", tirx.Shuffle(words, list(range(GATHERED))))
        w = load(self.weights, number * BLOCK, _BYTES)
        if self.dot.name == "relaxed":
            zero = splat(tirx.const(0, "int8"), _BYTES)
            for sign, part in enumerate((tirx.max(w, zero), tirx.max(zero - w, zero))):
                acc[sign] = self.dot.accumulate(acc[sign], x, part)
        elif self.dot.name == "pairs":
            count = self.dot.part_bytes
            for half in range(_BYTES // count):
                a, b = (v if count == _BYTES else dot.half(v, _BYTES, half) for v in (x, w))
                wide = f"int16x{count}"
                acc[0] = self.dot.accumulate(acc[0], tirx.Cast(wide, a), tirx.Cast(wide, b))
        else:
            acc[0] = self.dot.accumulate(acc[0], x, w)


TEMPLATE = KernelTemplate(
    name="q_sparse_gemv",
    matches=matches,
    default=default,
    emit=emit,
    pack=pack,
    variant=variant,
    rank=4,
    arithmetic="int8",
    accumulator="int32",
)
