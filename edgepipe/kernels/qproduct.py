"""What kernels share that multiply codes by weights: their arguments, and the end of a sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import load
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.requantize import addend, scaled


def arguments(
    op: QConvOp, weights: tuple[int, str], channels: int, scratch: Sequence[int] = ()
) -> list[tuple[str, int, str]]:
    """Buffers in their order; ``weights`` are elements and dtype of the packed weights."""
    return [
        ("x", op.x.elements, op.x.dtype),
        ("w", *weights),
        ("b", channels, "int32"),
        ("m", channels, "float32"),
        *((f"r{i}", r.layout.elements, r.layout.dtype) for i, r in enumerate(op.residuals)),
        ("y", op.y.elements, op.y.dtype),
        *((f"s{i}", size, "int32") for i, size in enumerate(scratch)),
    ]


def vectors(
    op: QConvOp, arrays: Sequence[np.ndarray], channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bias int32 and multiplier float32 of ``channels``, zero past the real ones.

    The bias takes the zero point of the input along.
    """
    weight, bias, multiplier = arrays
    sums = weight.sum((1, 2, 3), dtype=np.int64)
    padded_bias, padded = np.zeros(channels, np.int32), np.zeros(channels, np.float32)
    padded_bias[: len(sums)] = bias.astype(np.int64) - op.x.zero * sums
    padded[: len(sums)] = np.broadcast_to(multiplier, (len(sums),))
    return padded_bias, padded


def finished(
    op: QConvOp, total: Any, multipliers: Any, residuals: Sequence[Any], place: Any, channel: Any,
    lanes: int,
) -> Any:  # fmt: skip
    """The float sum of ``lanes`` channels of pixel ``place`` (n, row, column) from int32."""
    value = scaled(total, load(multipliers, channel, lanes), lanes, bool(op.residuals))
    n, row, column = place
    for buffer, residual in zip(residuals, op.residuals, strict=True):
        value = value + addend(buffer, residual, (n, 0, row, column), channel, lanes)
    return value
