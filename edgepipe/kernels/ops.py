"""What a kernel template is asked to compute: operator descriptions with layouts, all hashable."""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import Blocked


@dataclass(frozen=True)
class ConvOp:
    """2-D convolution ``x[n,ci,h,w] * w[co,ci/groups,kh,kw] + b[co]`` and its epilogue.

    ``offset`` is the top and left zero padding; what is needed below and to the right follows
    from the shapes. ``residuals`` are the layouts of the epilogue's operands, in step order.
    """

    x: Blocked
    y: Blocked
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    groups: int = 1
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()

    @property
    def macs(self) -> int:
        kh, kw = self.kernel
        return self.y.n * self.y.c * self.y.h * self.y.w * self.x.c // self.groups * kh * kw


@dataclass(frozen=True)
class PoolOp:
    """2-D pooling. ``kind`` is ``max`` or ``average``; ``offset`` as in ConvOp."""

    kind: str
    x: Blocked
    y: Blocked
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    count_include_pad: bool = False
    pads_end: tuple[int, int] = (0, 0)
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class GlobalPoolOp:
    """Mean or maximum over h and w. ``y`` is ``[n, c, 1, 1]``."""

    kind: str
    x: Blocked
    y: Blocked
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class MapOp:
    """Elementwise: the epilogue applied to ``x``. Residuals may be ``[n|1, c, 1, 1]``."""

    x: Blocked
    y: Blocked
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class RelayoutOp:
    """Copy between two layouts of one logical tensor."""

    x: Blocked
    y: Blocked

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class ConcatOp:
    """Concatenation along channels; every input but the last fills whole blocks."""

    inputs: tuple[Blocked, ...]
    y: Blocked

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class UpsampleOp:
    """Nearest-neighbour upsampling by whole factors ``(fy, fx)``."""

    x: Blocked
    y: Blocked
    factors: tuple[int, int]
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()

    @property
    def macs(self) -> int:
        return 0


@dataclass(frozen=True)
class MatmulOp:
    """``[batch, m, k] @ [batch|1, k, n] + bias[n]`` and its epilogue, all row-major float32.

    ``constant`` says that the right operand is a weight: it is packed at compile time and shared
    by the batch. ``transposed`` says that it is stored ``[n, k]``. Residuals are ``[batch, m, n]``
    (``"full"``) or ``[n]`` (``"row"``).
    """

    batch: int
    m: int
    k: int
    n: int
    constant: bool
    bias: bool = False
    b_batched: bool = False
    a_batched: bool = True
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[str, ...] = ()

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.k * self.n


Op = ConvOp | PoolOp | GlobalPoolOp | MapOp | RelayoutOp | ConcatOp | UpsampleOp | MatmulOp
