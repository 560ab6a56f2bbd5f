"""Kernels written as loops: for operators that are not one formula per output element.

A thin layer over TVM's IR builder. A ``Kernel`` is a context: what is written inside becomes one
PrimFunc over the node's inputs and outputs, called when the context ends::

    with Kernel(op, "cumsum", outputs=[0]) as k:
        x, y = k.input(0), k.output(0)
        with k.each(rows) as i, k.each(columns) as j:
            y[i, j] = x[i, j]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from edgepipe.lowering.converters.op import Expr, Op, dtype_of_expr, shape_of_expr


class _Flat:
    """A buffer addressed by row-major position."""

    def __init__(self, buffer: Any, shape: tuple[int, ...]) -> None:
        self.buffer, self.shape = buffer, shape

    def _index(self, position: Any) -> list[Any]:
        if not self.shape:
            return []
        index: list[Any] = []
        for extent in reversed(self.shape[1:]):
            index.insert(0, position % extent)
            position = position // extent
        return [position, *index]

    def __getitem__(self, position: Any) -> Any:
        return tirx.BufferLoad(self.buffer, self._index(position))

    def __setitem__(self, position: Any, value: Any) -> None:
        T.buffer_store(self.buffer, value, self._index(position))


class Tensor:
    """A buffer of a kernel: ``t[i, j]`` loads, ``t[i, j] = v`` stores, ``t.flat[p]`` is linear."""

    def __init__(self, buffer: Any, shape: tuple[int, ...], dtype: str) -> None:
        self.buffer, self.shape, self.dtype = buffer, shape, dtype
        self.flat = _Flat(buffer, shape)

    def _index(self, index: Any) -> list[Any]:
        return list(index) if isinstance(index, Sequence) else [index]

    def __getitem__(self, index: Any) -> Any:
        return tirx.BufferLoad(self.buffer, self._index(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        T.buffer_store(self.buffer, value, self._index(index))


@contextmanager
def If(condition: Any) -> Iterator[None]:
    """Statements executed when ``condition`` holds; always, when it is None."""
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


class Kernel:
    """One PrimFunc over inputs and outputs of ``op``; ``results`` after the context are Exprs.

    ``inputs`` replaces the node's inputs (None entries are skipped); ``outputs`` lists the output
    numbers the kernel writes, or (shape, dtype) pairs.
    """

    def __init__(
        self,
        op: Op,
        name: str,
        outputs: Sequence[int | tuple[tuple[int, ...], str]],
        inputs: Sequence[Expr | None] | None = None,
    ) -> None:
        self.op, self.name = op, name
        self._inputs = list(op.inputs if inputs is None else inputs)
        self._types = [
            (op.out_shape(o), op.out_dtype(o)) if isinstance(o, int) else o for o in outputs
        ]
        self._builder = IRBuilder()
        self._stack = ExitStack()
        self._open: list[Any] = []
        self._in: list[Tensor | None] = []
        self._out: list[Tensor] = []
        self.results: list[Expr] = []

    def __enter__(self) -> Kernel:
        self._stack.enter_context(self._builder)
        self._stack.enter_context(T.prim_func(is_private=True, s_tir=True))
        T.func_attr({"tirx.noalias": True})
        for i, x in enumerate(self._inputs):
            if x is None:
                self._in.append(None)
            else:
                self._in.append(self._argument(f"x{i}", shape_of_expr(x), dtype_of_expr(x)))
        for i, (shape, dtype) in enumerate(self._types):
            self._out.append(self._argument(f"y{i}", shape, dtype))
        self._stack.enter_context(T.sblock("root"))
        T.reads()
        T.writes()
        return self

    def _argument(self, name: str, shape: tuple[int, ...], dtype: str) -> Tensor:
        return Tensor(T.arg(name, T.Buffer(shape, dtype)), shape, dtype)

    def _body(self) -> None:
        """Open the block that holds the statements; allocations come before it."""
        if self._open:
            return
        block = T.sblock(self.name)
        self._stack.enter_context(block)
        self._open.append(block)
        whole = [
            t.buffer[tuple(slice(0, d) for d in t.shape)] if t.shape else t.buffer[()]
            for t in self._in
            if t is not None
        ]
        T.reads(*whole)
        T.writes(
            *[
                t.buffer[tuple(slice(0, d) for d in t.shape)] if t.shape else t.buffer[()]
                for t in self._out
            ]
        )

    def input(self, i: int) -> Tensor:
        """Input ``i`` of the kernel."""
        tensor = self._in[i]
        assert tensor is not None
        return tensor

    def output(self, i: int) -> Tensor:
        """Output ``i`` of the kernel."""
        return self._out[i]

    def local(self, dtype: str, count: int = 1) -> Tensor:
        """A few elements in registers or on the stack."""
        return Tensor(T.sblock_alloc_buffer((count,), dtype, scope="local"), (count,), dtype)

    def scratch(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Temporary memory, planned into the arena when it is large."""
        return Tensor(T.sblock_alloc_buffer(shape, dtype), shape, dtype)

    @contextmanager
    def each(self, extent: int) -> Iterator[Any]:
        """A serial loop."""
        self._body()
        with T.serial(0, extent) as i:
            yield i

    @contextmanager
    def nest(self, *extents: int) -> Iterator[list[Any]]:
        """Nested serial loops over ``extents``."""
        self._body()
        with ExitStack() as stack:
            yield [stack.enter_context(T.serial(0, e)) for e in extents]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            self._call()

    def _call(self) -> None:
        function = self._builder.get()
        bb = self.op.bb
        var = bb.add_func(function, self.name)
        types = [relax.TensorType(shape, dtype) for shape, dtype in self._types]
        arguments = [x for x in self._inputs if x is not None]
        result = bb.emit(relax.call_tir(var, arguments, types[0] if len(types) == 1 else types))
        if len(types) == 1:
            self.results = [result]
        else:
            self.results = [self.op.item(result, i) for i in range(len(types))]
