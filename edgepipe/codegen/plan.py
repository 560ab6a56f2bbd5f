"""The flat program a driver executes: kernel calls over inputs, outputs, weights and one arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from edgepipe.blob import Blob

if TYPE_CHECKING:
    import onnx_ir as ir

ALIGNMENT = 64  # bytes; one cache line, and the widest vector of any target

#: Threads that may share one inference of a bundle which does not say how many.
MOST_THREADS = 16

Space = Literal["input", "output", "arena", "weights"]


@dataclass(frozen=True)
class TensorSpec:
    """A model input or output: its ONNX name, static shape (row-major) and NumPy dtype name."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, value: ir.Value) -> TensorSpec:
        """That of a value with a static shape."""
        assert value.name and value.shape is not None and value.dtype is not None
        shape = tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
        return cls(value.name, shape, str(value.dtype.numpy()))


@dataclass(frozen=True)
class Place:
    """Where a kernel argument lives. ``index`` counts inputs/outputs; ``offset`` is in bytes."""

    space: Space
    offset: int = 0
    index: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel call: C symbol, pointer arguments in order, and the graph op it implements.

    ``pieces``: how many shares of its work threads can take; 1 where one thread does it alone. The
    arguments of ``strides`` above 0 are the kernel's own memory, so many bytes for each thread.
    ``warmed``: whether it can be told to turn without doing the work (``codegen.turns``).
    """

    symbol: str
    arguments: tuple[Place, ...]
    op: str
    pieces: int = 1
    strides: tuple[int, ...] = ()
    warmed: bool = False


@dataclass(frozen=True)
class SparseAudit:
    """What became of an op whose weights are a share of ``zeros``, 0…1.

    ``form`` is ``dense``, or how a sparse kernel stores the weights, ``stored_weights`` of them.
    ``estimated_instructions``: vector instructions per inference by form.
    """

    zeros: float
    form: str
    stored_weights: int | None = None
    estimated_instructions: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelAudit:
    """What really executes for one op: kernel, arithmetic, accumulator, work.

    ``macs`` counts zeros too, ``executed_macs`` the products of a kernel that does fewer (Winograd)
    or, to fill the tiles of a GPU's, more (0 where that is not known). ``weight_bytes`` and
    ``activation_bytes`` are the sizes of all tensors that the call reads or writes, each once.
    ``sparsity`` of an op whose weights have many zeros: see docs/sparsity.md. ``pieces`` as in
    ``Call``. ``tuned`` names where the tuning record is from that gave ``knobs``; empty where
    the template's default rule did. ``estimated_instructions``: of a convolution in integers,
    and of the same one in float32.
    """

    op: str
    op_type: str
    kernel: str
    arithmetic: str
    accumulator: str
    macs: int
    knobs: str = ""
    sparsity: SparseAudit | None = None
    weight_bytes: int = 0
    activation_bytes: int = 0
    pieces: int = 1
    tuned: str = ""
    estimated_instructions: dict[str, int] | None = None
    executed_macs: int = 0


@dataclass(frozen=True)
class ArenaTensor:
    """A piece of the arena, in bytes, and the first and the last call it is alive at."""

    offset: int
    size: int
    first: int
    last: int


@dataclass(frozen=True)
class PeakKernel:
    """A kernel that reaches what the core can: ``work`` operations ``of`` a dtype per call."""

    symbol: str
    of: str
    work: int


@dataclass(frozen=True)
class Peaks:
    """Objects with such kernels by variant, what they are, the bytes of the three buffers they
    take, and the bytes that one call of the copy beside them (``PREFIX_peak_bytes``) moves."""

    objects: Mapping[str, bytes] = field(default_factory=dict)
    kernels: Mapping[str, tuple[PeakKernel, ...]] = field(default_factory=dict)
    buffers: tuple[int, int, int] = (0, 0, 0)
    copy_bytes: int = 1


NO_PEAKS = Peaks()


@dataclass(frozen=True)
class Launch:
    """A CUDA kernel and the blocks and threads of one launch of it."""

    symbol: str
    blocks: tuple[int, int, int]
    threads: tuple[int, int, int]


@dataclass(frozen=True)
class Resources:
    """What one CUDA kernel takes on its sm, as ptxas reports."""

    registers: int
    shared_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class GpuCode:
    """Launches of each call's symbol, in order, and what the kernels take."""

    launches: Mapping[str, tuple[Launch, ...]]
    resources: Mapping[str, Resources]


@dataclass(frozen=True)
class Plan:
    """Everything a driver needs. Every tensor in ``weights`` is 64-byte aligned.

    ``peak_live_bytes`` is the largest sum of arena tensors alive at once, the lower bound
    of ``arena_bytes``; ``arena`` is where they lie, and when. ``gpu`` is what the calls launch
    where kernels run on a GPU. ``threads`` is as compiled, 0 for as many as the device has.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    calls: tuple[Call, ...]
    arena_bytes: int
    peak_live_bytes: int
    weights: Blob
    audit: tuple[KernelAudit, ...]
    arena: tuple[ArenaTensor, ...] = ()
    gpu: GpuCode | None = None
    threads: int = 1

    @property
    def most_threads(self) -> int:
        """How many the arena has room for."""
        return self.threads or MOST_THREADS
