"""The blocked activation layout ``NCHW{lanes}c``, its border being what convolutions pad with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Pads = tuple[int, int, int, int]  # top, left, bottom, right
NO_PADS: Pads = (0, 0, 0, 0)


@dataclass(frozen=True)
class Blocked:
    """An activation of logical shape ``[n, c, h, w]``: float32, or 8-bit codes.

    Stored as ``[n, ceil(c / lanes), top + h + bottom, left + w + right, lanes]``, row-major.
    Channels past ``c`` hold finite values that every reader multiplies by zero weights or drops;
    the border holds ``zero`` (the zero point of codes), written by the producer, so that
    convolutions need no pad copy. ``lanes == 1`` without a border is plain NCHW; one block of all
    channels, as codes have it, is NHWC.
    """

    n: int
    c: int
    h: int
    w: int
    lanes: int
    pads: Pads = NO_PADS
    dtype: str = "float32"
    zero: int = 0

    @property
    def blocks(self) -> int:
        """Channel blocks, the last one possibly part-filled."""
        return -(-self.c // self.lanes)

    @property
    def rows(self) -> int:
        return self.h + self.pads[0] + self.pads[2]

    @property
    def cols(self) -> int:
        return self.w + self.pads[1] + self.pads[3]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return self.n, self.blocks, self.rows, self.cols, self.lanes

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))

    @property
    def padded(self) -> bool:
        return self.pads != NO_PADS

    def offset(self, n: Any, block: Any, y: Any, x: Any) -> Any:
        """Element offset of lane 0 of interior pixel ``(y, x)``; negative means in the border."""
        row = (n * self.blocks + block) * self.rows + y + self.pads[0]
        return (row * self.cols + x + self.pads[1]) * self.lanes

    def pack(self, array: np.ndarray) -> np.ndarray:
        """``[n, c, h, w]`` → this layout, border and missing channels ``zero``."""
        top, left = self.pads[:2]
        shape = (self.n, self.blocks * self.lanes, self.rows, self.cols)
        grown = np.full(shape, self.zero, array.dtype)
        grown[:, : self.c, top : top + self.h, left : left + self.w] = array
        blocked = grown.reshape(self.n, self.blocks, self.lanes, self.rows, self.cols)
        return np.ascontiguousarray(blocked.transpose(0, 1, 3, 4, 2))

    def unpack(self, array: np.ndarray) -> np.ndarray:
        """This layout → ``[n, c, h, w]``."""
        blocked = array.reshape(self.shape).transpose(0, 1, 4, 2, 3)
        top, left = self.pads[:2]
        flat = blocked.reshape(self.n, self.blocks * self.lanes, self.rows, self.cols)
        return np.ascontiguousarray(flat[:, : self.c, top : top + self.h, left : left + self.w])

    def __str__(self) -> str:
        border = "+" + ",".join(map(str, self.pads)) if self.padded else ""
        codes = "" if self.dtype == "float32" else f"-{self.dtype}"
        return f"{self.n}x{self.c}x{self.h}x{self.w}c{self.lanes}{border}{codes}"
