"""What every CUDA kernel is made of: threads over vectors, borders, shared memory, the store.

A kernel here is a PrimFunc whose top-level statements bind ``blockIdx`` and ``threadIdx``; each
such statement becomes one launch. Activations are ``NCHW4c``: a thread reads and writes four
channels of a pixel as one vector, neighbouring threads neighbouring pixels. They are stored as
float32 or float16; arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.builder import Registers, load, operand_offset, splat, store
from edgepipe.kernels.epilogue import Step, apply
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.output import Fused

#: Threads of a block where nothing else decides: enough warps to hide latency on every sm.
THREADS = 128
WARP = 32
LANES = 4


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """An if; a condition known to be true costs nothing."""
    if condition is True:
        yield
        return
    with T.If(condition), T.Then():
        yield


@contextmanager
def launch(blocks: Sequence[int], threads: int) -> Iterator[tuple[Any, Any, Any, Any]]:
    """One launch: yields ``(block x, y, z, thread)``; missing extents are 1."""
    x, y, z = (*blocks, 1, 1)[:3]
    with (
        T.launch_thread("blockIdx.x", x) as bx,
        T.launch_thread("blockIdx.y", y) as by,
        T.launch_thread("blockIdx.z", z) as bz,
        T.launch_thread("threadIdx.x", threads) as t,
    ):
        yield bx, by, bz, t


@contextmanager
def parallel(count: int, threads: int = THREADS) -> Iterator[Any]:
    """One thread for each of ``0 .. count - 1``."""
    threads = min(threads, -(-count // WARP) * WARP)
    with launch((-(-count // threads),), threads) as (block, _, _, thread):
        index = block * threads + thread
        with when(True if count % threads == 0 else index < count):
            yield index


def read(buffer: Any, offset: Any, lanes: int) -> Any:
    """``lanes`` consecutive elements as float32, whatever they are stored as."""
    value = load(buffer, offset, lanes)
    return value if str(buffer.dtype) == "float32" else tirx.Cast(_floats(lanes), value)


def write(buffer: Any, offset: Any, value: Any, lanes: int) -> None:
    """Store ``lanes`` consecutive float32 as what ``buffer`` holds."""
    dtype = str(buffer.dtype)
    if dtype != "float32":
        value = tirx.Cast(f"{dtype}x{lanes}" if lanes > 1 else dtype, value)
    store(buffer, offset, value, lanes)


def _floats(lanes: int) -> str:
    return f"float32x{lanes}" if lanes > 1 else "float32"


def barrier() -> None:
    """All threads of a block wait for each other; their shared memory is then consistent."""
    T.evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))


def shared(elements: int, dtype: str = "float32") -> Any:
    """Shared memory of a block."""
    return T.alloc_buffer((elements,), dtype, scope="shared")


def fill_border(layout: Blocked, buffer: Any, thread: Any, threads: int) -> None:
    """Write the border of ``layout``, its zero, shared out to ``threads`` threads of one launch.

    No thread of the launch may read it. Costs no launch of its own.
    """
    if not layout.padded:
        return
    top, left, bottom, right = layout.pads
    across = (top + bottom) * layout.cols
    ring = across + (left + right) * layout.h
    unit = LANES if layout.lanes % LANES == 0 else 1
    parts = layout.lanes // unit  # codes have all channels in one block
    total = layout.n * layout.blocks * ring * parts

    def position(j: Any) -> Any:
        lower = tirx.Select(j < top * layout.cols, j, j + layout.h * layout.cols)
        if not left + right:
            return lower
        row, at = (j - across) // (left + right), (j - across) % (left + right)
        column = tirx.Select(at < left, at, at + layout.w)
        return tirx.Select(j < across, lower, (top + row) * layout.cols + column)

    with T.serial(0, -(-total // threads)) as turn:
        index = turn * threads + thread
        with when(True if total % threads == 0 else index < total):
            plane, j = index // (ring * parts), index // parts % ring
            at = (plane * (layout.rows * layout.cols) + position(j)) * parts + index % parts
            value = splat(tirx.const(layout.zero, layout.dtype), unit)
            store(buffer, at * unit, value, unit)


def each_vector(
    layout: Blocked, buffer: Any, compute: Callable[[Any, Any, Any, Any], None]
) -> None:
    """``compute(n, block, row, column)`` in a thread for each vector inside; then the border."""
    count = layout.n * layout.blocks * layout.h * layout.w
    threads = min(THREADS, -(-count // WARP) * WARP)
    with launch((-(-count // threads),), threads) as (block, _, _, thread):
        index = block * threads + thread
        with when(True if count % threads == 0 else index < count):
            pixel, plane = index % (layout.h * layout.w), index // (layout.h * layout.w)
            place = (plane // layout.blocks, plane % layout.blocks)
            compute(*place, pixel // layout.w, pixel % layout.w)
        if buffer is not None:
            fill_border(layout, buffer, index, -(-count // threads) * threads)


def applied(steps: Sequence[Step], value: Any, lanes: int, operands: Sequence[Any]) -> Any:
    """``value`` after the epilogue, lane by lane: CUDA has no vector arithmetic in float32."""
    if not steps:
        return value
    registers = Registers(1 + len(operands), lanes)
    for i, vector in enumerate((value, *operands)):
        registers[i] = vector
    for lane in range(lanes):
        scalars = [registers.lane(i + 1, lane) for i in range(len(operands))]
        result = apply(steps, registers.lane(0, lane), 1, scalars)
        store(registers.buffer, lane, result, 1)
    return registers[0]


def finish(op: Fused, residuals: Sequence[Any], target: Any, place: Any, value: Any) -> None:
    """Apply the epilogue to one vector and store it at ``place``, (n, block, row, column)."""
    lanes = op.y.lanes
    operands = [
        read(buffer, operand_offset(layout, *place), lanes)
        for buffer, layout in zip(residuals, op.residuals, strict=True)
    ]
    result = applied(op.epilogue, value, lanes, operands)
    write(target, op.y.offset(*place), result, lanes)


def reduced(memory: Any, thread: Any, threads: int, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine ``memory[0 .. threads)`` (a power of two) into ``memory[0]``, as a tree."""
    width = threads // 2
    while width:
        barrier()
        with when(thread < width):
            combined = combine(memory[thread], memory[thread + width])
            T.buffer_store(memory, combined, [thread])
        width //= 2
    barrier()
    return memory[0]


def zeros(count: int, lanes: int, dtype: str = "float32") -> Registers:
    """Accumulators, zero."""
    registers = Registers(count, lanes, dtype)
    for i in range(count):
        registers[i] = splat(tirx.const(0, dtype), lanes)
    return registers
