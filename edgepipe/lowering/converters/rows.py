"""LogSoftmax and RMSNormalization over contiguous rows of float32.

Each row is swept in vectors of ``LANES`` with a scalar tail; sums and maxima are kept per lane.
(Softmax and LayerNormalization of this form are kernel templates.) Other dtypes, axes and
broadcast scales take the general path in ``norm``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.lowering.converters.loops import Kernel, Tensor
from edgepipe.lowering.converters.numeric import libm
from edgepipe.lowering.converters.op import Expr, Op, const, product

#: Two 128-bit registers or one 256-bit register; more accumulators hide latency on all targets.
LANES = 8


def fits(op: Op, axis: int) -> bool:
    """Whether the rows are float32, contiguous from ``axis`` on, and longer than a vector."""
    return op.dtype() == "float32" and product(op.shape()[axis:]) >= LANES


def sweep(k: Kernel, n: int, body: Callable[[Any, Any], None]) -> None:
    """``body(position, lane)`` for all positions of a row; the tail uses the first lanes."""
    if n >= LANES:
        with k.each(n // LANES) as chunk, T.vectorized(0, LANES) as lane:
            body(chunk * LANES + lane, lane)
    if n % LANES:
        with k.each(n % LANES) as lane:
            body(n - n % LANES + lane, lane)


def _fill(lanes: Tensor, value: float) -> None:
    with T.vectorized(0, LANES) as lane:
        lanes[lane] = const(value, "float32")


def _fold(lanes: Tensor, combine: Callable[[Any, Any], Any]) -> Any:
    parts = [lanes[i] for i in range(LANES)]
    while len(parts) > 1:
        parts = [combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _add(a: Any, b: Any) -> Any:
    return a + b


def log_softmax(op: Op) -> Expr:
    """x − max − log Σ e**(x − max) over the last axis."""
    n = op.shape()[-1]
    rows = (product(op.shape()[:-1]), n)
    x_rows = op.reshape(op.inputs[0], rows)
    with Kernel(op, "log_softmax", outputs=[(rows, "float32")], inputs=[x_rows]) as k:
        x, y = k.input(0), k.output(0)
        lanes, top, shift = k.local("float32", LANES), k.local("float32"), k.local("float32")
        with k.each(rows[0]) as r:
            _fill(lanes, -np.inf)

            def highest(j: Any, lane: Any, r: Any = r) -> None:
                lanes[lane] = tirx.max(lanes[lane], x[r, j])

            sweep(k, n, highest)
            top[0] = _fold(lanes, tirx.max)
            _fill(lanes, 0.0)

            def power(j: Any, lane: Any, r: Any = r) -> None:
                lanes[lane] = lanes[lane] + tirx.exp(x[r, j] - top[0])

            sweep(k, n, power)
            shift[0] = libm("log", _fold(lanes, _add))

            def finish(j: Any, lane: Any, r: Any = r) -> None:
                y[r, j] = x[r, j] - top[0] - shift[0]

            sweep(k, n, finish)
    return op.reshape(k.results[0], op.shape())


def rms_norm(op: Op, axis: int, epsilon: float) -> Expr:
    """x / sqrt(mean(x²) + ε) · scale over the axes from ``axis`` on; scale covers them all."""
    shape = op.shape()
    n = product(shape[axis:])
    rows = (product(shape[:axis]), n)
    inputs = [op.reshape(op.inputs[0], rows), op.reshape(op.inputs[1], (n,))]
    with Kernel(op, "rms_norm", outputs=[(rows, "float32")], inputs=inputs) as k:
        x, scale, y = k.input(0), k.input(1), k.output(0)
        lanes, inverse = k.local("float32", LANES), k.local("float32")
        with k.each(rows[0]) as r:
            _fill(lanes, 0.0)

            def squares(j: Any, lane: Any, r: Any = r) -> None:
                lanes[lane] = lanes[lane] + x[r, j] * x[r, j]

            sweep(k, n, squares)
            mean = _fold(lanes, _add) * const(1 / n, "float32")
            inverse[0] = const(1, "float32") / tirx.sqrt(mean + const(epsilon, "float32"))

            def finish(j: Any, lane: Any, r: Any = r) -> None:
                y[r, j] = x[r, j] * inverse[0] * scale[j]

            sweep(k, n, finish)
    return op.reshape(k.results[0], shape)
