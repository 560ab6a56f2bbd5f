"""The flat program a driver executes: kernel calls over inputs, outputs, weights and one arena."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ALIGNMENT = 64  # bytes; one cache line, and the widest vector of any target

Space = Literal["input", "output", "arena", "weights"]


@dataclass(frozen=True)
class TensorSpec:
    """A model input or output: its ONNX name, static shape (row-major) and NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Place:
    """Where a kernel argument lives. ``index`` counts inputs/outputs; ``offset`` is in bytes."""

    space: Space
    offset: int = 0
    index: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel call: C symbol, pointer arguments in order, and the graph op it implements."""

    symbol: str
    arguments: tuple[Place, ...]
    op: str


@dataclass(frozen=True)
class KernelAudit:
    """What really executes for one op: kernel, arithmetic, accumulator, work.

    ``sparsity`` of an op whose weights have many zeros: see docs/sparsity.md.
    """

    op: str
    op_type: str
    kernel: str
    arithmetic: str
    accumulator: str
    macs: int
    knobs: str = ""
    sparsity: dict[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything a driver needs. ``weights`` is one blob, every tensor in it 64-byte aligned.

    ``peak_live_bytes`` is the largest sum of arena tensors alive at once, the lower bound
    of ``arena_bytes``.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    calls: tuple[Call, ...]
    arena_bytes: int
    peak_live_bytes: int
    weights: bytes
    audit: tuple[KernelAudit, ...]
