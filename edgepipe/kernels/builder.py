"""A thin layer over TVM's IR builder: flat buffers, vector registers, unrolled Python loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from edgepipe.kernels.layout import Blocked

#: Annotation of a loop whose iterations may run at the same time.
MARK = "edgepipe.parallel"


def float32(value: float) -> Any:
    """A float32 constant."""
    return tirx.const(float(value), "float32")


def splat(value: Any, lanes: int) -> Any:
    """Broadcast a scalar to a vector register."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def span(offset: Any, lanes: int) -> Any:
    """Index of ``lanes`` consecutive elements."""
    return tirx.Ramp(offset, 1, lanes) if lanes > 1 else offset


def load(buffer: Any, offset: Any, lanes: int) -> Any:
    """Load ``lanes`` consecutive elements at ``offset``."""
    return buffer[span(offset, lanes)]


def store(buffer: Any, offset: Any, value: Any, lanes: int) -> None:
    """Store a vector of ``lanes`` elements at ``offset``."""
    T.buffer_store(buffer, value, [span(offset, lanes)])


def hidden(distance: int) -> Any:
    """``distance`` in elements as an index that LLVM for AArch64 takes for unknown.

    Where vectors lie further apart than a load of two registers reaches, LLVM addresses all of
    them from one base, one by one. From a distance that it does not know it makes a base for each
    run of neighbours, which it then loads and stores two at a time.
    """
    zero = tirx.const(0, "int32")
    name = "llvm.aarch64.neon.sqadd"  # saturating addition, which it does not fold
    return tirx.call_llvm_pure_intrin("int32", name, tirx.const(distance, "int32"), zero)


class Registers:
    """``count`` vector registers: a local buffer that LLVM promotes, its indices being constant."""

    def __init__(self, count: int, lanes: int, dtype: str = "float32") -> None:
        self.count, self.lanes = count, lanes
        self.buffer = T.alloc_buffer((count * lanes,), dtype, scope="local")

    def __getitem__(self, index: int) -> Any:
        return load(self.buffer, index * self.lanes, self.lanes)

    def __setitem__(self, index: int, value: Any) -> None:
        store(self.buffer, index * self.lanes, value, self.lanes)

    def lane(self, index: int, lane: int) -> Any:
        """One scalar of register ``index``; broadcast again it becomes a by-element operand."""
        return self.buffer[index * self.lanes + lane]


@contextmanager
def loop(extent: int) -> Iterator[Any]:
    """A serial loop; an extent of 1 becomes the constant 0 and no loop."""
    if extent == 1:
        yield 0
    else:
        with T.serial(0, extent) as index:
            yield index


@contextmanager
def parallel(extent: int) -> Iterator[Any]:
    """A loop of which threads may share the iterations (``codegen.parts``): each writes elements of
    its own, or the same values as a neighbour, and reads nothing that another one writes.

    Loops directly inside one another are shared together. What stands beside the inner one is done
    by every part that has a share, what stands outside of all by the first; both may neither read
    what the loops write nor the other way round. Registers (``Registers``) are each part's own.
    """
    if extent == 1:
        yield 0
    else:
        with T.serial(0, extent, annotations={MARK: 1}) as index:
            yield index


@contextmanager
def counting(steps: Any, *strides: int) -> Iterator[list[Any]]:
    """A loop with a counter for each of ``strides``, which grows by it in each of ``steps``.

    For WebAssembly: V8 takes every instruction as it is in the module, and a loop's number times a
    stride would be two. Counters in bytes index ``bytes_of`` buffers without a shift.
    """
    counters = {stride: Registers(1, 1, "int32") for stride in strides}
    for counter in counters.values():
        counter[0] = tirx.const(0, "int32")
    end = steps * strides[0] if isinstance(steps, int) else T.bind(steps * strides[0])
    with T.While(counters[strides[0]][0] < end):
        yield [counters[stride][0] for stride in strides]
        for stride, counter in counters.items():
            counter[0] = counter[0] + stride


def forward(index: Any) -> Any:
    """``index``, of which LLVM is told that it is not negative.

    Only then are constants behind it those of a load in WebAssembly, and no additions.
    """
    held = T.bind(index)
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.assume", held >= 0))
    return held


def index_dtype(arch: str) -> str:
    """The type of an address in a register of ``arch``: no instruction widens it then."""
    return "int64" if arch in ("aarch64", "x86_64") else "int32"


def bytes_of(buffer: Any, itemsize: int = 4) -> Any:
    """The same memory as int8. What is written as one of the two must not be read as the other:
    they count as different memory."""
    elements = int(buffer.shape[0])
    return T.decl_buffer((elements * itemsize,), "int8", data=buffer.data)


def floats(held: Any, at: Any, lanes: int) -> Any:
    """``lanes`` float32 from byte ``at`` of a ``bytes_of`` buffer on."""
    dtype = f"float32x{lanes}" if lanes > 1 else "float32"
    return tirx.reinterpret(dtype, load(held, at, 4 * lanes))


def minimum(a: Any, b: Any) -> Any:
    """The smaller index; folded when both are known."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.min(a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger index; folded when both are known."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tirx.max(a, b)


def fma(a: Any, b: Any, c: Any, lanes: int, fused: bool) -> Any:
    """``a * b + c``; ``fused`` names the instruction instead of leaving it to contraction."""
    if not fused:
        return c + a * b
    dtype = f"float32x{lanes}" if lanes > 1 else "float32"
    return tirx.call_llvm_pure_intrin(dtype, "llvm.fma", a, b, c)


def kernel(name: str, arguments: Sequence[tuple[str, int, str]], body: Callable[..., None]) -> Any:
    """Build a PrimFunc from flat buffers ``(name, elements, dtype)`` and a function that emits.

    ``body`` is called with one buffer per argument, inside the builder.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        buffers = [T.arg(n, T.Buffer((size,), dtype)) for n, size, dtype in arguments]
        T.func_attr({"tirx.noalias": True, "edgepipe.template": name})
        body(*buffers)
    return builder.get()


def operand_offset(layout: Blocked, n: Any, block: Any, row: Any, column: Any) -> Any:
    """Offset in an epilogue operand, which may be broadcast over the batch or the pixels."""
    n = 0 if layout.n == 1 else n
    if layout.h == layout.w == 1:
        row = column = 0
    return layout.offset(n, block, row, column)


def pixels_from(
    layout: Blocked, row: Any, start: Any, count: int, flat: bool
) -> list[tuple[Any, Any]]:
    """Row and column of ``count`` neighbours from pixel ``start`` of ``row`` on, which is the whole
    image where that is ``flat``.

    Where a border lies between the rows of a flat image, one division serves all: a comparison
    each tells which of the others are in the next row.
    """
    width = layout.w
    if not flat:
        return [(row, start + i) for i in range(count)]
    if not layout.padded or count > width:
        return [((start + i) // width, (start + i) % width) for i in range(count)]
    first = Registers(2, 1, "int32")
    first[0], first[1] = start // width, start % width
    after = [tirx.Cast("int32", first[1] + i >= width) for i in range(count)]
    return [(first[0] + a, first[1] + i - a * width) for i, a in enumerate(after)]


def neighbours(
    layout: Blocked, row: Any, start: Any, count: int, flat: bool, even: bool,
    emit: Callable[[tuple[Any, Any], Sequence[Any]], None],
) -> None:  # fmt: skip
    """``pixels_from`` for kernels that store runs of pixels at constant distances.

    ``emit(first, gaps)`` receives row and column of the first pixel and, for each, how many pixels
    of the border lie between. Where a row may end in the tile it emits both sides of a branch,
    of which one has no gaps. ``even`` says that no row ends between an even pixel and the next.
    """
    if not (flat and layout.padded):
        emit((row, start), [0] * count)
        return
    held, width = Registers(2, 1, "int32"), layout.w
    held[0], held[1] = start // width, start % width
    first = held[0], held[1]
    with T.If(first[1] + count <= width):
        with T.Then():
            emit(first, [0] * count)
        with T.Else():
            ends = range(width, width + count - 1, width)
            columns = [first[1] + (i - i % 2 * even) for i in range(count)]
            emit(first, [
                sum(tirx.Cast("int32", column >= end) * (layout.cols - width) for end in ends)
                for column in columns
            ])  # fmt: skip


def zero_border(layout: Blocked, buffer: Any) -> None:
    """Write the border of ``layout``. Consumers read it as convolution padding.

    What lies behind a row and in front of the next one is one run.
    """
    if not layout.padded:
        return
    top, left, bottom, right = layout.pads

    def fill(at: Any, pixels: int) -> None:
        run = min(layout.lanes, 16)  # codes have all channels in one block
        runs, rest = divmod(pixels * layout.lanes, run)
        value = tirx.const(layout.zero, layout.dtype)
        with loop(runs) as r:
            store(buffer, at + r * run, splat(value, run), run)
        if rest:
            store(buffer, at + runs * run, splat(value, rest), rest)

    with parallel(layout.n) as n, parallel(layout.blocks) as block:
        if top or left:
            fill(layout.offset(n, block, -top, -left), top * layout.cols + left)
        if (left or right) and layout.h > 1:
            with parallel(layout.h - 1) as y:
                fill(layout.offset(n, block, y, layout.w), right + left)
        if bottom or right:
            last = layout.offset(n, block, layout.h - 1, layout.w)
            fill(last, right + bottom * layout.cols)
