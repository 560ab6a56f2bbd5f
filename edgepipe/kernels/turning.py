"""Rows of vectors as columns, in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from edgepipe.kernels.dot import intrinsic, reinterpret


def interleaved(rows: Sequence[Any]) -> list[Any]:
    """2, 4, 8 or 16 vectors of 16 bytes → as many of words that have a byte of each row, in their
    order."""
    width = 1
    while len(rows) > width:
        lanes = 16 // width
        rows = [reinterpret(f"int{8 * width}x{lanes}", row) for row in rows]
        # By groups of rows that are together already, ``width`` vectors each.
        groups = [rows[i : i + width] for i in range(0, len(rows), width)]
        halves = [[i // 2 + lanes * (i % 2) + h for i in range(lanes)] for h in (0, lanes // 2)]
        rows = [
            _apart(tirx.Shuffle([a, b], half))
            for first, second in zip(groups[::2], groups[1::2], strict=True)
            for a, b in zip(first, second, strict=True)
            for half in halves
        ]
        width *= 2
    kind = f"int{8 * width}x{16 // width}" if width < 16 else "int8x16"
    return [reinterpret(kind, row) for row in rows]


def transposed(rows: Sequence[Any]) -> list[Any]:
    """Columns of four int32x4."""
    a, b, c, d = rows
    low, high = ([0, 4, 1, 5], [2, 6, 3, 7])
    pairs = [tirx.Shuffle([x, y], index) for index in (low, high) for x, y in ((a, b), (c, d))]
    pairs = [reinterpret("int32x4", _apart(pair)) for pair in pairs]
    return [
        tirx.Shuffle(pairs[2 * half : 2 * half + 2], index)
        for half in (0, 1)
        for index in ([0, 1, 4, 5], [2, 3, 6, 7])
    ]


def _apart(vector: Any) -> Any:
    """16 bytes as float32x4, of which LLVM does not see how they came to be: for WebAssembly it
    would make every result of several shuffles by narrower ones of its own, four times as many."""
    held = reinterpret("float32x4", vector)
    return intrinsic("float32x4", "arithmetic.fence", held)
