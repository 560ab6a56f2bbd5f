"""The default CPU schedule, for every kernel that is not a template.

Correct for everything, decent for common cases, fast to compile. Per PrimFunc:

1. cheap element-wise producers are inlined into what reads them;
2. a reduction keeps ``lanes`` (times a few rows) neighbouring outputs in registers and walks the
   reduced axes outside of them; where the innermost output axis is short, the innermost reduced
   axis is cut into ``lanes`` partial results instead (rfactor);
3. the loops of element-wise blocks are fused as far as their accesses stay contiguous and cut
   into vectors with a scalar tail. (LLVM's loop vectoriser is off, see ``codegen.primfunc``.)

4. outer loops of kernels that are one nest of loops are marked: threads may share them.

Kernels with the attribute ``edgepipe.template`` and kernels written as loops (opaque
blocks) are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx

from edgepipe.context import Context
from edgepipe.kernels.builder import MARK
from edgepipe.lowering import schedule_cuda, traces
from edgepipe.lowering.blocks import (
    Block,
    contiguous,
    cost,
    fusible,
    read_blocks,
    vectorizable,
)

#: Outputs of one reduction held in registers: vectors per tile.
_TILE_VECTORS = 4
#: Shorter vectors cost more than they save.
_SHORTEST_VECTOR = 3


def schedule_rest(mod: Any, context: Context) -> tuple[Any, dict[str, str]]:
    """Schedule every PrimFunc of ``mod`` (IRModule) that has no template, as a tuning record says
    or by default; returns a new module, and whose record by the names of functions."""
    functions, target = {}, context.target
    tuned: dict[str, str] = {}
    steps = (_inline, schedule_cuda.bind) if target.kind == "cuda" else _CPU
    for var, function in mod.functions.items():
        if isinstance(function, tirx.PrimFunc) and not is_done(function):
            name = var.name_hint
            found, origin = traces.recorded(name, function, context) or (None, "")
            if found is not None:
                tuned[name] = origin
            functions[var] = found or schedule_function(function, target.simd.lanes_f32, steps)
        else:
            functions[var] = function
    return tvm.IRModule(functions, attrs=mod.attrs), tuned


def is_done(function: Any) -> bool:
    """Whether a PrimFunc is scheduled: by a template, or as TVM says."""
    attrs = function.attrs
    return attrs is not None and ("edgepipe.template" in attrs or "tirx.is_scheduled" in attrs)


def schedule_function(function: Any, lanes: int, steps: Sequence[Any] | None = None) -> Any:
    """Schedule one PrimFunc; what cannot be scheduled stays as it was."""
    try:
        sch = s_tir.Schedule(tvm.IRModule({"main": function}))
        blocks = read_blocks(sch)
    except Exception:
        return function
    if not blocks or any(b.opaque for b in blocks):
        return function
    for step in steps or _CPU:
        sch = _attempt(sch, step, lanes)
    return sch.mod["main"]


def _attempt(sch: Any, step: Any, lanes: int) -> Any:
    """Run ``step`` on a copy, so that a primitive that fails half way leaves nothing behind."""
    copy = sch.copy()
    try:
        step(copy, lanes)
    except Exception:
        return sch
    return copy


def _inline(sch: Any, lanes: int) -> None:
    del lanes
    for block in read_blocks(sch):
        if block.reduction or block.writes_output:
            continue
        consumers = [b for b in read_blocks(sch) if any(r.same_as(block.writes) for r in b.reads)]
        expensive = cost(block.node) > 2
        wider = any(b.iterations > block.iterations for b in consumers)
        if expensive and (wider or len(consumers) > 1):
            continue
        if block.guarded and any(b.reduction for b in consumers):
            continue  # padding: a test per tap costs more than the copy
        try:
            sch.compute_inline(sch.get_sblock(block.name))
        except Exception:
            continue


def _reduce(sch: Any, lanes: int) -> None:
    for block in read_blocks(sch):
        if block.reduction and vectorizable(block):
            try:
                _schedule_reduction(sch.copy(), block, lanes)
            except Exception:
                continue
            _schedule_reduction(sch, block, lanes)


def _schedule_reduction(sch: Any, block: Block, lanes: int) -> None:
    handle = sch.get_sblock(block.name)
    loops = sch.get_loops(handle)
    spatial = [x for x, kind in zip(loops, block.kinds, strict=True) if kind == "S"]
    reduced = [x for x, kind in zip(loops, block.kinds, strict=True) if kind == "R"]
    extents = {x: int(sch.get(x).extent) for x in loops}
    if spatial and extents[spatial[-1]] >= lanes:
        _vector_outputs(sch, handle, spatial, reduced, extents, lanes)
    elif reduced and extents[reduced[-1]] >= 2 * lanes:
        _vector_partials(sch, handle, spatial, reduced, extents, lanes)


def _vector_outputs(
    sch: Any, handle: Any, spatial: list[Any], reduced: list[Any], extents: Any, lanes: int
) -> None:
    """Order: outputs, reduced axes, a tile of neighbouring outputs in registers."""
    extent = extents[spatial[-1]]
    vector = _divisor(extent, lanes)
    if vector < _SHORTEST_VECTOR:
        return
    width = vector * _divisor(extent // vector, _TILE_VECTORS)
    outer, inner = sch.split(spatial[-1], [None, width])
    sch.reorder(*spatial[:-1], outer, *reduced, inner)
    local = sch.cache_write(handle, 0, "local")
    sch.reverse_compute_at(local, outer)
    rest, lane = sch.split(inner, [None, vector])
    sch.unroll(rest)
    sch.vectorize(lane)
    sch.vectorize(sch.split(sch.get_loops(local)[-1], [None, vector])[1])
    sch.decompose_reduction(handle, reduced[0])


def _divisor(extent: int, limit: int) -> int:
    """The largest divisor of ``extent`` up to ``limit``."""
    return next(d for d in range(min(extent, limit), 0, -1) if extent % d == 0)


def _vector_partials(
    sch: Any, handle: Any, spatial: list[Any], reduced: list[Any], extents: Any, lanes: int
) -> None:
    """Partial results per lane of the innermost reduced axis, then their reduction."""
    vector = _divisor(extents[reduced[-1]], lanes)
    if vector < _SHORTEST_VECTOR:
        return
    _, inner = sch.split(reduced[-1], [None, vector])
    partial = sch.rfactor(inner, 0)
    if spatial:
        sch.compute_at(partial, sch.get_loops(handle)[len(spatial) - 1])
    sch.set_scope(partial, 0, "local")
    lane, first, *rest = sch.get_loops(partial)[len(spatial) :]
    del rest
    sch.vectorize(_innermost(sch, partial, lane))
    sch.decompose_reduction(partial, first)


def _innermost(sch: Any, block: Any, loop: Any) -> Any:
    """Move ``loop`` inside all other loops of ``block``."""
    loops = sch.get_loops(block)
    position = next(i for i, x in enumerate(loops) if sch.get(x).same_as(sch.get(loop)))
    sch.reorder(*loops[position + 1 :], loop)
    return loop


def _spatial(sch: Any, lanes: int) -> None:
    blocks = read_blocks(sch)
    for block in blocks:
        if block.reduction or block.name.endswith("_local"):
            continue
        try:
            _schedule_spatial(sch.copy(), block, lanes, len(blocks) == 1)
        except Exception:
            continue
        _schedule_spatial(sch, block, lanes, len(blocks) == 1)


def _schedule_spatial(sch: Any, block: Block, lanes: int, alone: bool) -> None:
    loops = sch.get_loops(sch.get_sblock(block.name))
    if len(loops) != len(block.kinds) or not loops:
        return
    while len(loops) > 1 and fusible(block, len(loops) - 2):
        merged = sch.fuse(*loops[-2:])
        loops = [*loops[:-2], merged]
    if contiguous(block) and vectorizable(block):
        _vectorize(sch, loops[-1], lanes, alone)


def _vectorize(sch: Any, loop: Any, lanes: int, alone: bool) -> None:
    """Vectors of ``lanes``, with a scalar tail where that is possible."""
    extent = int(sch.get(loop).extent)
    vector = math.gcd(extent, lanes)
    # Partitioning hides what a block reads and writes: only for kernels of a single block.
    if alone and extent > lanes and vector < lanes // 2:
        loop, _ = sch.loop_partition(loop, [extent // lanes * lanes, None])
        vector = lanes
    elif vector < lanes // 2:
        vector = _divisor(extent, lanes)
    if vector >= _SHORTEST_VECTOR:
        sch.vectorize(sch.split(loop, [None, vector])[1])


def _share(sch: Any, lanes: int) -> None:
    """Mark the outer loops of a kernel of one nest for threads (``kernels.builder.parallel``)."""
    del lanes
    names = [block.name for block in read_blocks(sch)]
    chains = [[sch.get(x) for x in sch.get_loops(sch.get_sblock(name))] for name in names]
    if not all(chain and chain[0].same_as(chains[0][0]) for chain in chains):
        return
    for level in range(len(chains[0])):
        loop = sch.get_loops(sch.get_sblock(names[0]))[level]
        if sch.get(loop).kind != tirx.ForKind.SERIAL or not _independent(sch, names[0], level):
            return
        sch.annotate(loop, MARK, 1)
        if not isinstance(sch.get(loop).body, tirx.For):
            return


def _independent(sch: Any, name: str, level: int) -> bool:
    """Whether TVM lets the iterations of a loop run at the same time."""
    copy = sch.copy()
    try:
        copy.parallel(copy.get_loops(copy.get_sblock(name))[level])
    except Exception:
        return False
    return True


_CPU = (_inline, _reduce, _spatial, _share)
