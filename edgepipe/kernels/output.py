"""What all kernels over blocked layouts share: their argument list, and the fused store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from edgepipe.kernels.builder import load, operand_offset, store
from edgepipe.kernels.epilogue import Step, apply
from edgepipe.kernels.layout import Blocked

Argument = tuple[str, int, str]


class Fused(Protocol):
    """An op with an output layout and an epilogue."""

    @property
    def y(self) -> Blocked: ...
    @property
    def epilogue(self) -> tuple[Step, ...]: ...
    @property
    def residuals(self) -> tuple[Blocked, ...]: ...


def signature(op: Fused, inputs: Sequence[Argument]) -> list[Argument]:
    """``inputs`` (activations and packed weights), the epilogue's operands, the output."""
    operands = [(f"r{i}", r.elements, r.dtype) for i, r in enumerate(op.residuals)]
    return [*inputs, *operands, ("y", op.y.elements, op.y.dtype)]


def finish(
    op: Fused, residuals: Sequence[Any], target: Any, place: Any, value: Any, at: Any = None
) -> None:
    """Apply the epilogue to one vector and store it at ``place``, (n, block, row, column).

    ``at`` is the offset of that place, where it is to be computed in another way.
    """
    lanes = op.y.lanes
    operands = [
        load(buffer, operand_offset(layout, *place), lanes)
        for buffer, layout in zip(residuals, op.residuals, strict=True)
    ]
    at = op.y.offset(*place) if at is None else at
    store(target, at, apply(op.epilogue, value, lanes, operands), lanes)
