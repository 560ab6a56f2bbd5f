"""Kernels of which one call computes a part, so that several threads can share them.

A kernel marks loops whose iterations do not depend on one another (``kernels.builder.parallel``).
Marked loops directly inside one another are one space of ``pieces``; part p of P runs its pieces
⌊pieces·p/P⌋ up to ⌊pieces·(p+1)/P⌋, in order. Every piece is computed by the same instructions
whatever P is, so results have the same bits. What stands outside of marked loops is done by part 0,
but registers and workspaces, of which every part has its own, are filled by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm_ffi import structural_walk

from edgepipe.kernels.builder import MARK

_DECLARING = (tirx.AllocBuffer, tirx.DeclBuffer, tirx.Bind)


@dataclass(frozen=True)
class Sliced:
    """A kernel body in parts. ``params`` (int32: part and parts) follow its own; ``pieces`` are
    those of the loops that have most."""

    body: list[Any]
    params: tuple[Any, ...]
    pieces: int


def slice_body(statements: list[Any], workspaces: Sequence[Any] = ()) -> Sliced | None:
    """The flat ``statements`` of a kernel for one part of several, or None where no loop of more
    than one iteration is marked. ``workspaces`` are buffers that every part has of its own."""
    pieces = max((_pieces(s) for s in statements), default=1)
    if pieces == 1:
        return None
    part, parts = tirx.Var("part", "int32"), tirx.Var("parts", "int32")
    body: list[Any] = []
    private = [*workspaces, *(s.buffer for s in statements if isinstance(s, tirx.AllocBuffer))]
    for statement in statements:
        own = _pieces(statement)
        if own > 1:
            low, high = (tirx.Var(name, "int32") for name in ("low", "high"))
            bounds = [tirx.truncdiv(own * p, parts) for p in (part, part + 1)]
            body += [tirx.Bind(v, b) for v, b in zip((low, high), bounds, strict=True)]
            body.append(_cut(statement, _int(0), low, high))
        elif isinstance(statement, _DECLARING) or _fills(private, statement):
            body.append(statement)
        else:
            body.append(tirx.IfThenElse(part == _int(0), statement, None))
    return Sliced(body, (part, parts), pieces)


def _replaced(body: Any, old: Any, new: Any) -> Any:
    """``body`` with one of its statements replaced."""
    parts = body.seq if isinstance(body, tirx.SeqStmt) else [body]
    return tirx.stmt_seq(*[new if s.same_as(old) else s for s in parts])


def _fills(buffers: list[Any], statement: Any) -> bool:
    """Whether it stores, and to none but ``buffers`` and those that it allocates itself."""
    stored: list[Any] = []
    own = list(buffers)
    structural_walk(
        statement,
        (tirx.BufferStore, lambda store: stored.append(store.buffer)),
        (tirx.AllocBuffer, lambda held: own.append(held.buffer)),
    )
    return bool(stored) and all(any(s.same_as(b) for b in own) for s in stored)


def _int(value: int) -> Any:
    return tirx.const(value, "int32")


def _is_marked(statement: Any) -> bool:
    return isinstance(statement, tirx.For) and MARK in statement.annotations


def _inner(loop: Any) -> Any:
    """The one marked loop directly inside ``loop``; None where there is none, or several."""
    body = loop.body.seq if isinstance(loop.body, tirx.SeqStmt) else [loop.body]
    marked = [s for s in body if _is_marked(s)]
    return marked[0] if len(marked) == 1 else None


def _pieces(statement: Any) -> int:
    if not _is_marked(statement):
        return 1
    inner = _inner(statement)
    return int(statement.extent) * (1 if inner is None else _pieces(inner))


def _cut(loop: Any, first: Any, low: Any, high: Any) -> Any:
    """``loop``, whose first piece is number ``first``, over its pieces from ``low`` to ``high``."""
    inner, extent = _inner(loop), int(loop.extent)
    stride = 1 if inner is None else _pieces(inner)
    begin = tirx.truncdiv(tirx.max(low - first, _int(0)), _int(stride))
    most = tirx.min(high - first, _int(extent * stride))
    end = tirx.truncdiv(most + _int(stride - 1), _int(stride))
    body = loop.body
    if inner is not None:
        cut = _cut(inner, first + _cast("int32", loop.loop_var) * _int(stride), low, high)
        body = _replaced(body, inner, cut)
    # An empty range has no negative extent.
    count, dtype = tirx.max(end - begin, _int(0)), str(loop.loop_var.ty.dtype)
    return tirx.For(loop.loop_var, _cast(dtype, begin), _cast(dtype, count), loop.kind, body)


def _cast(dtype: str, value: Any) -> Any:
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)
