"""The operators in float64 NumPy, written for clarity: what the kernels are checked against."""

from __future__ import annotations

import math

import numpy as np

from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.ops import BilinearOp, ConvOp, ConvTransposeOp, PoolOp


def _windows(x: np.ndarray, op: ConvOp | PoolOp, fill: float) -> np.ndarray:
    """``[n, c, oh, ow, kh, kw]`` windows of ``x`` with ``fill`` around it."""
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.strides, op.dilations
    top, left = op.offset
    height = (op.y.h - 1) * sy + (kh - 1) * dy + 1
    width = (op.y.w - 1) * sx + (kw - 1) * dx + 1
    grown = np.full((*x.shape[:2], max(height, top + op.x.h), max(width, left + op.x.w)), fill)
    grown[:, :, top : top + op.x.h, left : left + op.x.w] = x
    rows = np.arange(op.y.h)[:, None] * sy + np.arange(kh) * dy
    cols = np.arange(op.y.w)[:, None] * sx + np.arange(kw) * dx
    return grown[:, :, rows[:, None, :, None], cols[None, :, None, :]]


def conv(x: np.ndarray, w: np.ndarray, b: np.ndarray, op: ConvOp) -> np.ndarray:
    windows = _windows(x.astype(np.float64), op, 0.0)
    n, groups = x.shape[0], op.groups
    windows = windows.reshape(n, groups, -1, *windows.shape[2:])
    weights = w.astype(np.float64).reshape(groups, -1, *w.shape[1:])
    out = np.einsum("ngchwkl,gockl->ngohw", windows, weights, optimize=True)
    return out.reshape(n, -1, *out.shape[-2:]) + b.astype(np.float64)[:, None, None]


def conv_transpose(x: np.ndarray, w: np.ndarray, b: np.ndarray, op: ConvTransposeOp) -> np.ndarray:
    """Scatter every input element, then crop: the definition."""
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.strides, op.dilations
    height = max((op.x.h - 1) * sy + (kh - 1) * dy + 1, op.offset[0] + op.y.h)
    width = max((op.x.w - 1) * sx + (kw - 1) * dx + 1, op.offset[1] + op.y.w)
    out = np.zeros((x.shape[0], op.y.c, height, width))
    for ky in range(kh):
        for kx in range(kw):
            part = np.einsum("nchw,co->nohw", x.astype(np.float64), w[:, :, ky, kx].astype(float))
            rows = slice(ky * dy, ky * dy + (op.x.h - 1) * sy + 1, sy)
            out[:, :, rows, kx * dx : kx * dx + (op.x.w - 1) * sx + 1 : sx] += part
    top, left = op.offset
    return out[:, :, top : top + op.y.h, left : left + op.y.w] + b.astype(float)[:, None, None]


def bilinear(x: np.ndarray, op: BilinearOp) -> np.ndarray:
    """Two passes of linear interpolation with clamped coordinates."""
    result = x.astype(np.float64)
    for axis, size in ((2, op.y.h), (3, op.y.w)):
        extent = x.shape[axis]
        at = np.arange(size)
        if op.mode == "align_corners":
            place = at * (extent - 1) / (size - 1) if size > 1 else at * 0.0
        elif op.mode == "asymmetric":
            place = at * extent / size
        else:
            place = (at + 0.5) * extent / size - 0.5
        place = place.clip(0, extent - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, extent - 1)
        shape = [1] * 4
        shape[axis] = size
        share = (place - low).reshape(shape)
        result = result.take(low, axis) * (1 - share) + result.take(high, axis) * share
    return result


def pool(x: np.ndarray, op: PoolOp) -> np.ndarray:
    if op.kind == "max":
        return _windows(x.astype(np.float64), op, -np.inf).max((-1, -2))
    total = _windows(x.astype(np.float64), op, 0.0).sum((-1, -2))
    inside = np.ones((op.x.n, op.x.c, op.x.h, op.x.w))
    if not op.count_include_pad:
        return total / _windows(inside, op, 0.0).sum((-1, -2))
    top, left = op.offset
    bottom, right = op.pads_end
    grown = np.pad(inside, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=1)
    (kh, kw), (sy, sx) = op.kernel, op.strides
    counts = np.array(
        [
            [grown[0, 0, y * sy : y * sy + kh, x * sx : x * sx + kw].sum() for x in range(op.y.w)]
            for y in range(op.y.h)
        ]
    )
    return total / counts


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


def apply(steps: tuple[Step, ...], x: np.ndarray, operands: list[np.ndarray]) -> np.ndarray:
    """The epilogue in float64."""
    rest = [o.astype(np.float64) for o in operands]
    for step in steps:
        if step.takes_operand:
            r = rest.pop(0)
            x = {
                "add": lambda x=x, r=r: x + r,
                "mul": lambda x=x, r=r: x * r,
                "sub": lambda x=x, r=r: x - r,
                "rsub": lambda x=x, r=r: r - x,
                "max": lambda x=x, r=r: np.maximum(x, r),
                "min": lambda x=x, r=r: np.minimum(x, r),
                "prelu": lambda x=x, r=r: np.where(x > 0, x, x * r),
            }[step.kind]()
        else:
            x = UNARY[step.kind](x, *(float(np.float32(v)) for v in step.values))
    return x


def _hard_sigmoid(x: np.ndarray, a: float, b: float) -> np.ndarray:
    return np.clip(a * x + b, 0, 1)


UNARY = {
    "relu": lambda x: np.maximum(x, 0),
    "clip": np.clip,
    "leaky_relu": lambda x, a: np.where(x > 0, x, a * x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda x: x * _hard_sigmoid(x, 1 / 6, 0.5),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "elu": lambda x, a: np.where(x > 0, x, a * np.expm1(x)),
    "scale": lambda x, a: x * a,
    "offset": lambda x, a: x + a,
    "sqrt": np.sqrt,
    "neg": lambda x: -x,
    "abs": np.abs,
}
