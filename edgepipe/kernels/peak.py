"""What a core can reach at best: kernels that only multiply, or only move bytes, within the cache.

They use the instructions that the templates use, so that what a profile calls the peak is that of
the code and not of a data sheet. A peak is the best of several register tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgepipe.kernels import dot as dots
from edgepipe.kernels.builder import Registers, fma, kernel, load, loop, store
from edgepipe.target import Target

#: Bytes that one call of a copy kernel moves, half of them read and half written.
COPY_BYTES = 8192
_STEPS, _REPEATS = 32, 64


@dataclass(frozen=True)
class Peak:
    """A PrimFunc over buffers x, w and y of ``sizes`` bytes; ``work`` is what one call does: two
    operations per multiply-accumulate, or bytes where ``of`` is "bytes"."""

    of: str
    function: Any
    sizes: tuple[int, int, int]
    work: int


def kernels(target: Target, variant: str = "") -> dict[str, Peak]:
    """By name: float32 and int8 products in several tiles, and a copy."""
    tiles = ((4, 4), (4, 5), (4, 6)) if target.simd.registers >= 32 else ((2, 4), (2, 5), (3, 4))
    return {
        **{f"peak_float32_{i}": _float32(target, *tile) for i, tile in enumerate(tiles)},
        **{f"peak_int8_{i}": _int8(target, variant, *tile) for i, tile in enumerate(tiles)},
        "peak_bytes": _copy(target),
    }


def _float32(target: Target, rows: int, columns: int) -> Peak:
    lanes = target.simd.lanes_f32
    fused = target.simd.fma and target.arch in ("aarch64", "arm")

    def term(acc: Any, x: Any, w: Any) -> Any:
        return fma(x, w, acc, lanes, fused)

    def operand(buffer: Any, at: Any) -> Any:
        return load(buffer, at * lanes, lanes)

    return _tile("float32", (rows, columns), ("float32", lanes), ("float32", lanes, operand),
                 ("float32", lanes, operand), term, lanes)  # fmt: skip


def _int8(target: Target, variant: str, rows: int, columns: int) -> Peak:
    if variant == "relaxed" and target.integer.dot == "relaxed":
        dot = dots.named("relaxed", 4, True)
    else:
        dot = dots.choose(target, min(target.integer.weight_limit, 63), 64)
    x_bytes = dot.step
    kind = "int8" if dot.signed else "uint8"

    def x_operand(buffer: Any, at: Any) -> Any:
        if dot.name != "mlal":
            return dot.operand(buffer, at * x_bytes)
        return [load(buffer, (at * 2 + k) * 16, 16) for k in (0, 1)]

    def w_operand(buffer: Any, at: Any) -> Any:
        if dot.name != "mlal":
            return dot.weight(load(buffer, at * dot.part_bytes, dot.part_bytes))
        return [load(buffer, (at * 2 + k) * 16, 16) for k in (0, 1)]

    def term(acc: Any, x: Any, w: Any) -> Any:
        if dot.name != "mlal":
            return dot.accumulate(acc, x, w)
        return dots.multiply_long(target.arch, list(zip(x, w, strict=True)), acc)

    pair = dot.name == "mlal"  # two products of 16 bytes share one widening sum
    return _tile("int8", (rows, columns), ("int32", dot.lanes),
                 (kind, 32 if pair else x_bytes, x_operand),
                 ("int8", 32 if pair else dot.part_bytes, w_operand),
                 term, 32 if pair else dot.part_bytes)  # fmt: skip


_Operand = tuple[str, int, Callable[[Any, Any], Any]]


def _tile(
    of: str, tile: tuple[int, int], sums: tuple[str, int], left: _Operand, right: _Operand,
    term: Callable[[Any, Any, Any], Any], macs: int,
) -> Peak:  # fmt: skip
    """``tile`` accumulators (dtype, lanes): rows times columns of ``term``, over ``_STEPS``
    vectors per row. Rows are read anew in each step, or the products could leave the loop."""
    (rows, columns), (dtype, lanes) = tile, sums
    (x_type, x_elements, x_operand), (w_type, w_elements, w_operand) = left, right
    item = {"float32": 4, "int8": 1, "uint8": 1}
    sizes = (_STEPS * rows * x_elements, columns * w_elements, rows * columns * lanes)

    def body(x: Any, w: Any, y: Any) -> None:
        acc = Registers(rows * columns, lanes, dtype)
        for i in range(rows * columns):
            acc[i] = load(y, i * lanes, lanes)
        with loop(_REPEATS), loop(_STEPS) as step:
            read = [x_operand(x, step * rows + r) for r in range(rows)]
            for c in range(columns):
                held = w_operand(w, c)
                for r in range(rows):
                    acc[r * columns + c] = term(acc[r * columns + c], read[r], held)
        for i in range(rows * columns):
            store(y, i * lanes, acc[i], lanes)

    arguments = [("x", sizes[0], x_type), ("w", sizes[1], w_type), ("y", sizes[2], dtype)]
    return Peak(
        of,
        kernel(f"peak_{of}", arguments, body),
        (sizes[0] * item[x_type], sizes[1] * item[w_type], sizes[2] * 4),
        2 * macs * rows * columns * _STEPS * _REPEATS,
    )


def _copy(target: Target) -> Peak:
    lanes = target.simd.lanes_f32
    unrolled, count = 8, COPY_BYTES // 8

    def body(x: Any, w: Any, y: Any) -> None:
        with loop(count // (unrolled * lanes)) as i:
            for k in range(unrolled):
                at = (i * unrolled + k) * lanes
                store(y, at, load(x, at, lanes), lanes)

    arguments = [("x", count, "float32"), ("w", 1, "float32"), ("y", count, "float32")]
    return Peak(
        "bytes", kernel("peak_bytes", arguments, body), (4 * count, 4, 4 * count), COPY_BYTES
    )
