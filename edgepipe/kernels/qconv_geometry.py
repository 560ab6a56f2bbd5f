"""How a convolution of codes is laid out: runs, steps, tiles, packed weights; see ``qconv``."""

from __future__ import annotations

import numpy as np

from edgepipe.kernels import dot
from edgepipe.kernels.dot import Dot
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.template import Knobs


def merges(op: QConvOp) -> bool:
    """Whether the taps of a row follow one another without a gap."""
    return op.groups == 1 and op.dilations[1] == 1


class Geometry:
    """Runs and tiles of one op under given knobs; what ``pack`` and ``emit`` must agree on."""

    def __init__(self, op: QConvOp, knobs: Knobs) -> None:
        self.op = op
        self.dot: Dot = dot.named(knobs["dot"], knobs["lanes"], knobs["signed"])
        kh, kw = op.kernel
        self.merged = merges(op)
        ci = op.x.lanes if op.groups == 1 else op.x.c // op.groups
        self.run_bytes = kw * ci if self.merged else ci
        self.runs = kh if self.merged else kh * kw
        #: Bytes in front of the next run where short ones share a step, else 0.
        self.word = self.word_of(op) if self.dot.step == 16 else 0
        if self.word:
            self.runs = -(-kh * self.word // self.dot.step)
        self.steps = 1 if self.word else -(-self.run_bytes // self.dot.step)
        #: Whether the last step of a run has half the bytes.
        self.halved = (
            self.dot.step == 16 and op.bits == 8 and not self.word and 0 < self.run_bytes % 16 <= 8
        )
        #: Whether the last step has a byte for each of its weights of four bits: two steps share
        #: theirs, but sixteen zeros would take as long as weights.
        self.whole_last = op.bits == 4 and self.dot.step == 16 and self.steps % 2 == 1
        if op.bits == 4 and not self.whole_last:
            self.steps += self.steps % 2
        stored = knobs["stored"] if "stored" in knobs else knobs["groups"]
        self.width: int = stored * self.dot.lanes
        self.channels = op.y.lanes * op.y.blocks
        per_group = self.channels // op.groups
        self.tiles = op.groups * -(-per_group // self.width)
        self.ci = ci
        #: Rows, or pixels of a flat image, whose inputs are packed together; 0: none are.
        self.strip = int(knobs.get("strip", 0)) if self.dot.name == "pairs" else 0
        #: Bytes of packed inputs of two pixels, and of all.
        self.pair_bytes = self.runs * self.steps * 16
        rows, columns = (1, self.strip) if knobs["flat"] else (self.strip, op.y.w)
        pairs = rows * -(-columns // knobs["pixels"]) * (knobs["pixels"] // 2)
        self.packed_bytes = pairs * self.pair_bytes

    @staticmethod
    def word_of(op: QConvOp) -> int:
        """What a row of taps is rounded up to where several fit a step of sixteen bytes (images of
        few channels), else 0."""
        word = next((w for w in (4, 8) if op.kernel[1] * op.x.lanes <= w), 0)
        return word if op.bits == 8 and merges(op) and op.kernel[0] > 1 else 0

    @property
    def stored(self) -> int:
        """Vectors of channels whose weights are stored together. A register tile has them all, or
        fewer where they are stored for a variant's."""
        return self.width // self.dot.lanes

    @property
    def run_stride(self) -> int:
        """Packed weights of one run of a tile of channels, in bytes."""
        steps = (self.steps + self.whole_last) * self.dot.step - (8 if self.halved else 0)
        return steps * self.width * self.op.bits // 8

    @property
    def tile_bytes(self) -> int:
        """Packed weights of one tile of channels."""
        return self.runs * self.run_stride

    def lay(self, weight: np.ndarray) -> np.ndarray:
        """``[channels, ci, kh, kw]`` int8 → ``[tiles, tile_bytes]`` before bits are packed."""
        rows = weight.transpose(0, 2, 3, 1)
        if self.word:
            rows = rows.reshape(self.channels, rows.shape[1], self.run_bytes)
            size = (self.channels, self.runs * self.dot.step // self.word, self.word)
            grown = np.zeros(size, np.int8)
            grown[:, : rows.shape[1], : self.run_bytes] = rows
            rows = grown
        length = self.dot.step if self.word else self.run_bytes
        rows = rows.reshape(self.channels, self.runs, length)
        long = np.zeros((self.channels, self.runs, self.steps * self.dot.step), np.int8)
        long[..., :length] = rows
        tiles = np.stack([long[s : s + self.width] for s in self.starts()])
        whole = self.steps - self.halved
        step = self.dot.step
        parts = [tiles[..., : whole * step].reshape(*tiles.shape[:3], whole, step)]
        parts = [parts[0].transpose(0, 2, 3, 1, 4).reshape(self.tiles, self.runs, -1)]
        if self.halved:
            end = tiles[..., whole * step : whole * step + 8].transpose(0, 2, 1, 3)
            parts.append(end.reshape(self.tiles, self.runs, -1))
        return np.ascontiguousarray(np.concatenate(parts, -1))

    def starts(self) -> list[int]:
        """First channel of each tile."""
        return [min(t * self.width, self.channels - self.width) for t in range(self.tiles)]
