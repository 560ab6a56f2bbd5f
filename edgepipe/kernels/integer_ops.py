"""What integer kernels are asked to compute. Codes are 8-bit; accumulators are int32.

Each addend of a result is an int32 value times a float32 multiplier. Where ``y`` holds codes, the
sum is cut to ``limits``, rounded half to even, and ``y.zero`` added; where it is float32, the sum
is cut to ``limits``. (``edgepipe.quantization.interpreter`` has the definition.)
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepipe.kernels.layout import Blocked


@dataclass(frozen=True)
class Limits:
    """Bounds of a float sum. ``bounded`` says that it surely lies within ±2^22 by itself, ``short``
    that it rounds to an int16."""

    low: float
    high: float
    bounded: bool = False
    short: bool = False


@dataclass(frozen=True)
class Residual:
    """Codes added to a result, (code − layout.zero) · multiplier each."""

    layout: Blocked
    multiplier: float


@dataclass(frozen=True)
class QConvOp:
    """Convolution of codes ``x`` (NHWC) with int8 weights ``w[co, ci/groups, kh, kw]``.

    ``offset`` is the top and left padding. ``bits`` is how weights are stored, ``limit`` their
    largest magnitude. Bias (int32, which takes −x.zero · Σw along) and multipliers (float32) are
    per output channel. A dense layer over m rows is the pointwise convolution of m pixels.
    ``short_sums`` of a depthwise one: how many taps, row by row, may be added up in int16 before
    they are widened, as its weights allow; empty where only ``limit`` is known.
    ``stored`` counts the blocks of four input channels that a kernel runs over, 0 for all.
    """

    x: Blocked
    y: Blocked
    kernel: tuple[int, int]
    limits: Limits
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    offset: tuple[int, int] = (0, 0)
    groups: int = 1
    bits: int = 8
    limit: int = 127
    residuals: tuple[Residual, ...] = ()
    short_sums: tuple[int, ...] = ()
    stored: int = 0

    @property
    def macs(self) -> int:
        kh, kw = self.kernel
        return self.y.n * self.y.c * self.y.h * self.y.w * self.x.c // self.groups * kh * kw

    @property
    def depthwise(self) -> bool:
        """One filter per channel."""
        return self.groups == self.x.c == self.y.c and self.groups > 1


@dataclass(frozen=True)
class QMatmulOp:
    """y[batch, m, n] = Σ (a − a.zero)(b − b.zero) · multiplier: codes a [batch, m, k] and b
    [batch, k, n], row-major. ``b_batch`` is 1 where all products share b."""

    a: Blocked
    b: Blocked
    y: Blocked
    batch: int
    b_batch: int
    m: int
    k: int
    n: int
    multiplier: float
    limits: Limits

    @property
    def macs(self) -> int:
        return self.batch * self.m * self.k * self.n


@dataclass(frozen=True)
class QAddOp:
    """Sum of tensors of codes of one shape, or a change of grid where there is one."""

    addends: tuple[Residual, ...]
    y: Blocked
    limits: Limits


@dataclass(frozen=True)
class QMulOp:
    """Elementwise product (a − a.zero)(b − b.zero) · multiplier; b may have one pixel."""

    a: Blocked
    b: Blocked
    y: Blocked
    multiplier: float
    limits: Limits


@dataclass(frozen=True)
class QPoolOp:
    """Maximum of codes, or their sum times a multiplier, over a window (``average``)."""

    kind: str
    x: Blocked
    y: Blocked
    kernel: tuple[int, int]
    strides: tuple[int, int]
    offset: tuple[int, int] = (0, 0)
    multiplier: float = 1.0
    limits: Limits = Limits(0, 0)


@dataclass(frozen=True)
class QResizeOp:
    """Bilinear between codes, along the height and the width, times a multiplier."""

    x: Blocked
    y: Blocked
    multiplier: float
    limits: Limits


@dataclass(frozen=True)
class QTableOp:
    """y = table[x]: a function of one code."""

    x: Blocked
    y: Blocked


@dataclass(frozen=True)
class QuantizeOp:
    """Codes of a float32 tensor in any layout; ``scale`` of the grid, zero in ``y``."""

    x: Blocked
    y: Blocked
    scale: float


@dataclass(frozen=True)
class DequantizeOp:
    """Float32 of a tensor of codes, in any layout."""

    x: Blocked
    y: Blocked
    scale: float


@dataclass(frozen=True)
class MoveOp:
    """Codes from one layout to another: plain and blocked, or into a part of a concatenation.

    ``inputs`` lie side by side along the channels of ``y``. ``factors`` repeat pixels (nearest
    upsampling by whole factors). ``spread`` s > 1 puts s² channels of one input into s × s pixels:
    y[c, s·u + v, s·r + w] = x[(s·v + w) · y.c + c, u, r], or, where the channels ``interleave``,
    x[s² · c + s·v + w, u, r].
    """

    inputs: tuple[Blocked, ...]
    y: Blocked
    factors: tuple[int, int] = (1, 1)
    spread: int = 1
    interleave: bool = False


IntegerOp = (
    QConvOp
    | QMatmulOp
    | QAddOp
    | QMulOp
    | QPoolOp
    | QResizeOp
    | QTableOp
    | QuantizeOp
    | DequantizeOp
    | MoveOp
)
