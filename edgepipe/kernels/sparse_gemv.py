"""A dense layer of one row over its nonzero weights: a classifier, which reads each weight once.

Each output walks its own list of places. Four at a time, the inputs they name are gathered into a
vector and multiplied with as many weights; an output's last places may be fillers of weight zero.
Such a layer waits for its weights, so what counts is how many bytes they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import Registers, fma, kernel, load, parallel, splat, store
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.sparse import GATHERED, offset_dtype, pack_gathered
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.target import Target


def matches(op: Op, target: Target) -> str | None:
    return None if isinstance(op, MatmulOp) and op.sparse is not None else ""


def default(op: MatmulOp, target: Target) -> Knobs:
    return {"fused": target.arch in ("aarch64", "arm")}


def place_dtype(op: MatmulOp) -> str:
    """The narrowest type that holds every place."""
    return "uint8" if op.k <= 256 else offset_dtype(op.k - 1)


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` (and ``b[n]``) → places, the groups where outputs start, weights, bias."""
    weight, *rest = arrays
    places, starts, stored = pack_gathered(np.asarray(weight, np.float32).T)
    index = places.astype(place_dtype(op))
    return [index, starts, stored, *(np.asarray(a, np.float32) for a in rest)]


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    assert op.sparse is not None
    stored = op.sparse.places
    arguments = [
        ("a", op.k, "float32"),
        ("places", stored, place_dtype(op)),
        ("starts", op.n + 1, "int32"),
        ("w", stored, "float32"),
    ]
    if op.bias:
        arguments.append(("bias", op.n, "float32"))
    arguments += [(f"r{i}", op.n, "float32") for i in range(len(op.residuals))]
    arguments.append(("y", op.n, "float32"))
    return kernel("sparse_gemv", arguments, lambda *buffers: _run(op, knobs, buffers))


def _run(op: MatmulOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
    a, places, starts, weights, *rest, target = buffers
    bias = rest.pop(0) if op.bias else None
    with parallel(op.n) as output:
        acc = Registers(1, GATHERED)
        acc[0] = splat(tirx.const(0, "float32"), GATHERED)
        first = starts[output]
        with T.serial(0, starts[output + 1] - first) as group:
            at = (first + group) * GATHERED
            inputs = [a[tirx.Cast("int32", places[at + i])] for i in range(GATHERED)]
            gathered = tirx.Shuffle(inputs, list(range(GATHERED)))
            vector = load(weights, at, GATHERED)
            acc[0] = fma(gathered, vector, acc[0], GATHERED, knobs["fused"])
        total = (acc.lane(0, 0) + acc.lane(0, 2)) + (acc.lane(0, 1) + acc.lane(0, 3))
        if bias is not None:
            total = total + bias[output]
        value = apply(op.epilogue, total, 1, [buffer[output] for buffer in rest])
        store(target, output, value, 1)


TEMPLATE = KernelTemplate(
    name="sparse_gemv", matches=matches, default=default, emit=emit, pack=pack, rank=3
)
