"""What a kernel template is asked to compute: operator descriptions with layouts, all hashable.

Those that multiply say how often (``macs``, multiply-accumulates per inference).
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.integer_ops import IntegerOp
from edgepipe.kernels.layout import Blocked, Pads
from edgepipe.kernels.sparse import Sparse
from edgepipe.kernels.weights import FLOAT32, WeightFormat


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
    weights: WeightFormat = FLOAT32
    #: How the weights that are not zero are stored; None for all of them.
    sparse: Sparse | None = None

    @property
    def macs(self) -> int:
        kh, kw = self.kernel
        return self.y.n * self.y.c * self.y.h * self.y.w * self.x.c // self.groups * kh * kw


@dataclass(frozen=True)
class ConvTransposeOp:
    """2-D transposed convolution ``x[n,ci,h,w]``, weights ``w[ci,co,kh,kw]``, one group.

    ``offset`` is what is cropped from the top and left of the full result.
    """

    x: Blocked
    y: Blocked
    kernel: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()
    weights: WeightFormat = FLOAT32

    @property
    def macs(self) -> int:
        kh, kw = self.kernel
        return self.x.n * self.x.c * self.x.h * self.x.w * self.y.c * kh * kw

    def taps(self, axis: int, phase: int) -> list[tuple[int, int]]:
        """``(tap, shift)`` of the taps that reach outputs ``phase + stride * i`` of ``axis``.

        Such an output reads input ``i + shift``: the transposed convolution is one ordinary
        convolution of stride 1 per phase.
        """
        stride, dilation = self.strides[axis], self.dilations[axis]
        found = []
        for tap in range(self.kernel[axis]):
            shift, rest = divmod(phase + self.offset[axis] - tap * dilation, stride)
            if rest == 0:
                found.append((tap, shift))
        return found

    def border(self) -> Pads:
        """The zero border of ``x`` that the taps read."""
        sides = []
        for axis, (size, extent) in enumerate(((self.y.h, self.x.h), (self.y.w, self.x.w))):
            low = high = 0
            for phase in range(min(self.strides[axis], size)):
                count = -(-(size - phase) // self.strides[axis])
                for _, shift in self.taps(axis, phase):
                    low = max(low, -shift)
                    high = max(high, count - 1 + shift - (extent - 1))
            sides.append((low, high))
        return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


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


@dataclass(frozen=True)
class GlobalPoolOp:
    """Mean or maximum over h and w. ``y`` is ``[n, c, 1, 1]``."""

    kind: str
    x: Blocked
    y: Blocked
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()


@dataclass(frozen=True)
class MapOp:
    """Elementwise: the epilogue applied to ``x``. Residuals may be ``[n|1, c, 1, 1]``."""

    x: Blocked
    y: Blocked
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()


@dataclass(frozen=True)
class RelayoutOp:
    """Copy between two layouts of one logical tensor."""

    x: Blocked
    y: Blocked


@dataclass(frozen=True)
class ConcatOp:
    """Concatenation along channels; every input but the last fills whole blocks."""

    inputs: tuple[Blocked, ...]
    y: Blocked


@dataclass(frozen=True)
class UpsampleOp:
    """Nearest-neighbour upsampling by whole factors ``(fy, fx)``."""

    x: Blocked
    y: Blocked
    factors: tuple[int, int]
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()


@dataclass(frozen=True)
class BilinearOp:
    """Bilinear resizing; ``mode`` is ONNX's coordinate_transformation_mode."""

    mode: str
    x: Blocked
    y: Blocked
    epilogue: tuple[Step, ...] = ()
    residuals: tuple[Blocked, ...] = ()


@dataclass(frozen=True)
class MatmulOp:
    """``[batch, m, k] @ [batch|1, k, n] + bias[n]`` and its epilogue, all row-major.

    ``constant`` says that the right operand is a weight: it is packed at compile time and shared
    by the batch. Residuals are ``[batch, m, n]`` (``"full"``) or ``[n]`` (``"row"``). The dtypes
    are those in memory, float32 or float16, of the left operand, of a right one that is no weight,
    of the result, and of residuals (none: all float32).
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
    weights: WeightFormat = FLOAT32
    a_dtype: str = "float32"
    b_dtype: str = "float32"
    y_dtype: str = "float32"
    residual_dtypes: tuple[str, ...] = ()
    #: How the weights of one row that are not zero are stored; None for all of them.
    sparse: Sparse | None = None

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.k * self.n


@dataclass(frozen=True)
class SoftmaxOp:
    """Softmax over the last dimension of ``[rows, n]``, row-major."""

    rows: int
    n: int
    x_dtype: str = "float32"
    y_dtype: str = "float32"


@dataclass(frozen=True)
class LayerNormOp:
    """Layer normalisation over the last dimension of ``[rows, n]`` with scale and bias ``[n]``."""

    rows: int
    n: int
    epsilon: float
    bias: bool = True
    x_dtype: str = "float32"
    y_dtype: str = "float32"


Op = (
    ConvOp
    | ConvTransposeOp
    | PoolOp
    | GlobalPoolOp
    | MapOp
    | RelayoutOp
    | ConcatOp
    | UpsampleOp
    | BilinearOp
    | MatmulOp
    | SoftmaxOp
    | LayerNormOp
    | IntegerOp
)
