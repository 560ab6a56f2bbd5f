"""Dense layers of few outputs, such as the last one of a classifier or a regression: vectors of k.

``rows`` of the input times every output are accumulated at once, each in ``parts`` vectors that
take turns along k and are added up in the end. A layer with a single output is thus as fast as
memory allows, and its sum is ``parts * lanes`` short ones: what rounding does to it stays small
even where the terms cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgepipe.kernels.builder import (
    Registers,
    float32,
    fma,
    kernel,
    load,
    loop,
    minimum,
    parallel,
    splat,
    store,
)
from edgepipe.kernels.epilogue import apply
from edgepipe.kernels.ops import MatmulOp, Op
from edgepipe.kernels.template import KernelTemplate, Knobs
from edgepipe.kernels.unpack import TileWeights, half_conversion
from edgepipe.kernels.weights import store as store_rows
from edgepipe.target import Target

#: What it takes to add up the lanes of one output, in multiply-adds.
LANE_SUM = 8


def _accumulators(target: Target) -> int:
    """How many vectors are summed into at once; more than eight spill in WebAssembly."""
    return 8 if target.kind == "wasm" else min(24, target.simd.registers - 4)


def matches(op: Op, target: Target) -> str | None:
    if not isinstance(op, MatmulOp) or not op.constant or op.sparse or not op.a_batched:
        return ""
    if op.weights.group or op.weights.kind == "int4":
        return ""  # words of eight rows, and groups of k, are made for the columns' vectors
    lanes, most = target.simd.lanes_f32, _accumulators(target)
    if _rows(op) > 1:
        most = min(most, lanes - 1)  # vectors of outputs are used by several rows
    if op.n > most or op.k < 2 * lanes:
        return ""
    # Multiply-adds of a row: here, with the sums over lanes; and with vectors of outputs.
    width = min(lanes, 1 << op.n.bit_length() - 1)
    return None if op.n * (op.k / lanes + LANE_SUM) < -(-op.n // width) * op.k else ""


def _rows(op: MatmulOp) -> int:
    return op.batch * op.m


def default(op: MatmulOp, target: Target) -> Knobs:
    lanes, most = target.simd.lanes_f32, _accumulators(target)
    rows = min(_rows(op), 4, most // op.n)
    return {
        "lanes": lanes,
        "rows": rows,
        "parts": max(1, min(8, most // (rows * op.n), op.k // lanes)),
        "fused": target.arch in ("aarch64", "arm"),
        "half": half_conversion(target),
    }


def _vectors(op: MatmulOp, knobs: Knobs) -> int:
    """Vectors of weights of one output; the last may be filled up."""
    return int(-(-op.k // knobs["lanes"]))


def pack(op: MatmulOp, knobs: Knobs, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``w[k, n]`` → ``[n][k]``, k filled up to whole vectors; scales and bias stay as they are."""
    weight, *rest = arrays
    vectors, lanes = _vectors(op, knobs), knobs["lanes"]
    rows = np.pad(weight.T, ((0, 0), (0, vectors * lanes - op.k)))
    stored = store_rows(op.weights, rows.reshape(-1, lanes))
    return [stored, *(np.asarray(a, np.float32) for a in rest)]


def emit(op: MatmulOp, knobs: Knobs) -> Any:
    arguments = [("a", _rows(op) * op.k, "float32")]
    arguments += op.weights.arguments(op.n * _vectors(op, knobs), knobs["lanes"], op.n)
    if op.bias:
        arguments.append(("bias", op.n, "float32"))
    sizes = {"full": _rows(op) * op.n, "row": op.n}
    arguments += [(f"r{i}", sizes[kind], "float32") for i, kind in enumerate(op.residuals)]
    arguments.append(("y", _rows(op) * op.n, "float32"))
    return kernel("narrow_dense", arguments, lambda *buffers: _run(op, knobs, buffers))


def _run(op: MatmulOp, knobs: Knobs, buffers: Sequence[Any]) -> None:
    rows, parts, lanes = knobs["rows"], knobs["parts"], knobs["lanes"]
    a, *rest, y = buffers
    held, rest = rest[: op.weights.arrays], rest[op.weights.arrays :]
    weights = TileWeights(op.weights, held, (1, lanes), knobs["half"], knobs["fused"])
    bias = rest.pop(0) if op.bias else None
    whole = op.k // lanes
    with parallel(-(-_rows(op) // rows)) as tile:
        row = minimum(tile * rows, _rows(op) - rows)
        acc = Registers(rows * op.n * parts, lanes)  # [row][output][part]
        for r in range(acc.count):
            acc[r] = splat(float32(0), lanes)

        def step(first: Any, part: int, inputs: Registers) -> None:
            """Multiply-add vector ``first + part`` of k of every row, held in ``inputs``."""
            for j in range(op.n):
                (weight,) = weights.row(j * _vectors(op, knobs) + first, part)
                for i in range(rows):
                    r = (i * op.n + j) * parts + part
                    acc[r] = fma(inputs[i], weight, acc[r], lanes, knobs["fused"])

        def steps(first: Any, count: int) -> None:
            for part in range(count):
                inputs = Registers(rows, lanes)
                for i in range(rows):
                    inputs[i] = load(a, (row + i) * op.k + (first + part) * lanes, lanes)
                step(first, part, inputs)

        with loop(whole // parts) as turn:
            steps(turn * parts, parts)
        steps(whole - whole % parts, whole % parts)
        if op.k % lanes:
            inputs = Registers(rows, lanes)
            for i in range(rows):
                inputs[i] = splat(float32(0), lanes)
                for k in range(op.k % lanes):
                    store(inputs.buffer, i * lanes + k, a[(row + i) * op.k + whole * lanes + k], 1)
            step(whole - whole % parts, whole % parts, inputs)

        for i in range(rows):
            for j in range(op.n):
                at = (row + i) * op.n + j
                value = _sum(acc, (i * op.n + j) * parts, parts)
                if op.weights.coded:
                    value = value * weights.factors[j]
                if bias is not None:
                    value = value + bias[j]
                operands = [
                    buffer[at if kind == "full" else j]
                    for buffer, kind in zip(rest, op.residuals, strict=True)
                ]
                store(y, at, apply(op.epilogue, value, 1, operands), 1)


def _sum(acc: Registers, first: int, parts: int) -> Any:
    """The lanes of ``parts`` registers: these added up, then halves of what is left."""
    for part in range(1, parts):
        acc[first] = acc[first] + acc[first + part]
    lanes = [acc.lane(first, lane) for lane in range(acc.lanes)]
    while len(lanes) > 1:
        middle = len(lanes) // 2
        lanes = [x + y for x, y in zip(lanes[:middle], lanes[middle:], strict=True)]
    return lanes[0]


TEMPLATE = KernelTemplate(
    name="narrow", matches=matches, default=default, emit=emit, pack=pack, rank=1
)
