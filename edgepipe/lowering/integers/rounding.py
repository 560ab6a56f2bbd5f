"""Rounding of sums of scaled integers to codes of the target's type."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.lowering.integers import read
from edgepipe.lowering.integers.terms import Codes, Sum, Term
from edgepipe.lowering.integers.writer import Writer
from edgepipe.quantization import interpreter
from edgepipe.quantization.graph import Array


def representable(total: Sum) -> bool:
    """One addend of any kind that comes first or can, the others tensors of codes."""
    kinds = [term.kind for term in total.terms]
    if len(kinds) == 1:
        return True
    others = kinds[1:] if len(kinds) > 2 else sorted(kinds, key=lambda k: k == "codes")[1:]
    return "table" not in kinds and all(kind == "codes" for kind in others)


def ordered(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The term that is not mere codes first. Two addends commute in float32; more do not."""
    if len(terms) == 2 and terms[0].kind == "codes":
        return terms[1], terms[0]
    return terms


def shift(writer: Writer, dtype: ir.DataType) -> int:
    """What is added to codes of ``dtype`` to make them codes of the target's type."""
    return read.LOWEST[writer.type] - read.LOWEST[dtype]


def round_to(
    writer: Writer, total: Sum, scale: Array, zero: int, output: ir.Value, name: str | None
) -> Codes:
    """Codes of ``total`` on the grid (scale, zero), in the target's type."""
    assert output.dtype is not None
    low, high = interpreter.INT_LIMITS[output.dtype]
    first, last = low - zero, high - zero
    if total.low > -np.inf:
        first = max(first, int(np.rint(np.float32(total.low) / scale)))
    if total.high < np.inf:
        last = min(last, int(np.rint(np.float32(total.high) / scale)))
    moved = zero + shift(writer, output.dtype)
    if total.terms[0].kind == "table":
        return _look_up(writer, total, scale, (first, last), moved, output)
    terms = ordered(total.terms)
    multipliers = tuple(np.asarray(t.scale / scale, np.float32) for t in terms)
    whole = Sum(terms, names=(*total.names, name) if name else total.names)
    value = writer.emit(whole, multipliers, (first, last), moved, output, writer.type)
    return Codes(value, scale, moved)


def _look_up(
    writer: Writer, total: Sum, scale: Array, limits: tuple[int, int], zero: int, output: ir.Value
) -> Codes:
    """A function of one tensor of codes: all 256 results, rounded now."""
    term = total.terms[0]
    assert term.table is not None
    asked = interpreter.Sum((interpreter.Term(term.table, term.scale),))
    codes = interpreter.requantize(asked, scale, 0, *limits) + np.int32(zero)
    table = codes.astype(writer.type.numpy())
    inner = read.table_of(term.inputs[0])
    source = term.inputs[0]
    if inner is not None:  # a table of a table
        source, table = inner[0], table[inner[1].astype(np.int32) - read.LOWEST[writer.type]]
    folded = Term("table", (source,), term.scale, term.node, table=table)
    value = writer.emit(Sum((folded,), names=total.names), (), limits, zero, output, writer.type)
    value.meta[read.TABLE] = (source, table)
    return Codes(value, scale, zero)
