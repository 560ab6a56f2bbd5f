"""Recorded schedules of functions that no template executes: TVM's traces, by what they compute."""

from __future__ import annotations

import re
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import Trace

from edgepipe.context import Context
from edgepipe.lowering.blocks import read_blocks

#: What stands for a template in records of traces, and their version: TVM's instructions.
NAME, VERSION = "metaschedule", 1
STAGE = "lowering.traces"


def module_of(function: Any) -> Any:
    """``function`` as the only one of a module, named as MetaSchedule wants it."""
    return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


def key(name: str, function: Any) -> str:
    """What a function computes, as text: its operators and buffers to read, and TVM's hash of its
    structure, in which no names count."""
    operators = re.sub(r"\d+(?=_|$)", "", name)
    buffers = ", ".join(f"{p.dtype}{[int(d) for d in p.shape]}" for p in function.params)
    bare = function.without_attr("global_symbol")
    digest = tvm_ffi.structural_hash(bare, map_free_vars=True) & (2**64 - 1)
    return f"{operators}({buffers}) #{digest:016x}"


def worth(function: Any) -> bool:
    """Whether there is something to search: a reduction whose loops TVM sees."""
    try:
        blocks = read_blocks(s_tir.Schedule(module_of(function)))
    except Exception:
        return False
    return bool(blocks) and not any(b.opaque for b in blocks) and any(b.reduction for b in blocks)


def text(schedule: Any) -> list[Any]:
    """The trace of ``schedule`` as JSON."""
    plain: list[Any] = _plain(schedule.trace.simplified(remove_postproc=False).as_json())
    return plain


def _plain(value: Any) -> Any:
    """TVM's containers and numbers as Python's."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, tirx.IntImm | tirx.FloatImm):
        return value.value
    if hasattr(value, "items"):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value]


def apply(function: Any, trace: list[Any]) -> Any:
    """``function`` scheduled as recorded. Raises what TVM raises where it does not fit."""
    schedule = s_tir.Schedule(module_of(function))
    Trace.apply_json_to_schedule(trace, schedule)
    scheduled = schedule.mod["main"]
    kept = function.attrs["global_symbol"] if "global_symbol" in (function.attrs or {}) else None
    bare = scheduled.without_attr("global_symbol")
    return bare if kept is None else bare.with_attr("global_symbol", kept)


def recorded(name: str, function: Any, context: Context) -> tuple[Any, str] | None:
    """``function`` by the record of ``context`` that is about it, and whose that is; None where the
    default schedule is better. A record that does not fit is noted and left out."""
    record = context.records.find(NAME, key(name, function), context.target)
    if record is None or not record.knobs:
        return None
    origin = context.records.origin[record.key]
    why = f"made for version {record.version}, this is {VERSION}"
    if record.version == VERSION:
        try:
            return apply(function, record.knobs["trace"]), origin
        except Exception as error:
            why = f"it does not fit ({type(error).__name__})"
    context.note(STAGE, name, f"stale tuning record of {origin} left out: {why}")
    return None
