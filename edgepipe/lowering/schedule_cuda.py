"""The default GPU schedule, for every kernel that is not a template: a thread per output.

Element-wise producers are inlined as for a CPU. Then the spatial axes of each block are fused
and cut into blocks of threads; reduced axes run inside a thread, in a register. What is written as
plain loops is left to a single thread.
"""

from __future__ import annotations

from typing import Any

from edgepipe.lowering.blocks import Block, read_blocks

#: Threads of a block; neighbouring threads write neighbouring elements.
THREADS = 128


def bind(sch: Any, lanes: int) -> None:
    """Bind every block of ``main`` to threads."""
    del lanes
    for block in read_blocks(sch):
        _bind_block(sch, block)


def _bind_block(sch: Any, block: Block) -> None:
    handle = sch.get_sblock(block.name)
    loops = sch.get_loops(handle)
    if len(loops) != len(block.kinds):  # a scalar has no loops, or one that is not its own
        loops = loops or [sch.add_unit_loop(handle)]
    kinds = block.kinds or ("S",)
    spatial = [x for x, kind in zip(loops, kinds, strict=True) if kind == "S"]
    reduced = [x for x, kind in zip(loops, kinds, strict=True) if kind == "R"]
    if not spatial:
        spatial = [sch.add_unit_loop(loops[0])]
    sch.reorder(*spatial, *reduced)
    index = sch.fuse(*spatial) if len(spatial) > 1 else spatial[0]
    # No more threads than outputs: TVM forgets the test of an axis whose only index is 0.
    threads = min(THREADS, int(sch.get(index).extent))
    outer, inner = sch.split(index, [None, threads])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
    if reduced:
        local = sch.cache_write(handle, 0, "local")
        sch.reverse_compute_at(local, inner)
        sch.decompose_reduction(handle, reduced[0])
