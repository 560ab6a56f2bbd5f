"""What a converter sees of one ONNX node, and the expressions it may build from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm
from tvm import relax, te, tirx
from tvm.ir import GenericConst

from edgepipe.errors import Unsupported
from edgepipe.lowering.integers.terms import DOMAIN

#: A Relax expression. TVM ships no types, so this name is documentation.
Expr = Any
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scalar:
    """A one-element constant input: converters read it as an immediate, not as a buffer."""

    value: float | int | bool
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Rank 0: a scalar broadcasts against everything."""
        return ()


def at(tensor: Any, index: Sequence[Any]) -> Any:
    """Element of ``tensor`` that ``index`` of a NumPy-broadcast result reads."""
    if isinstance(tensor, Scalar):
        return const(tensor.value, tensor.dtype)
    own = list(index)[len(index) - len(tensor.shape) :]
    return tensor(*[0 if int(d) == 1 else i for d, i in zip(tensor.shape, own, strict=True)])


def const(value: float | int | bool, dtype: str) -> Any:
    """An immediate of NumPy dtype name ``dtype``."""
    if dtype == "bool":
        return tirx.const(bool(value), "bool")
    return tirx.const(float(value) if dtype.startswith("float") else int(value), dtype)


def kind(value: Any) -> str:
    """NumPy dtype name of a TIR expression or a TE tensor."""
    return str(value.dtype if hasattr(value, "dtype") else value.ty.dtype)


def cast(value: Any, dtype: str) -> Any:
    """``value`` as ``dtype`` (no instruction when it already is)."""
    return value if kind(value) == dtype else tirx.Cast(dtype, value)


def shape_of(tensor: Any) -> tuple[int, ...]:
    """Static shape of a TE tensor."""
    return tuple(int(d) for d in tensor.shape)


def product(dims: Sequence[int]) -> int:
    """Number of elements of a shape; 1 for rank 0."""
    result = 1
    for dim in dims:
        result *= int(dim)
    return result


@dataclass(frozen=True)
class Buffer:
    """Marks a one-element constant that a kernel reads as a tensor all the same."""

    expr: Expr


@dataclass(frozen=True)
class Op:
    """A node with its inputs as Relax expressions. All shapes are static.

    ``inputs[i]`` is None where the optional input is absent. ``opset`` is the version of the
    standard domain the model imports.
    """

    node: ir.Node
    bb: Any
    inputs: list[Expr | None]
    opset: int

    @property
    def type(self) -> str:
        """The ONNX operator name."""
        return self.node.op_type

    def attr(self, name: str, default: Any = None) -> Any:
        """Value of attribute ``name`` as Python int, float, str, tuple or array."""
        attribute = self.node.attributes.get(name)
        if attribute is None:
            return default
        value = attribute.value
        return value.numpy() if attribute.type == ir.AttributeType.TENSOR else value

    def has(self, i: int) -> bool:
        """Whether input ``i`` is given."""
        return i < len(self.inputs) and self.inputs[i] is not None

    def wants(self, i: int) -> bool:
        """Whether output ``i`` has a name."""
        return i < len(self.node.outputs) and bool(self.node.outputs[i].name)

    def shape(self, i: int = 0) -> tuple[int, ...]:
        """Static shape of input ``i``."""
        return shape_of_expr(self.inputs[i])

    def dtype(self, i: int = 0) -> str:
        """NumPy dtype name of input ``i``."""
        return dtype_of_expr(self.inputs[i])

    def shape_of(self, x: Expr) -> tuple[int, ...]:
        """Static shape of an expression."""
        return shape_of_expr(x)

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """Shape the graph declares for output ``i``."""
        shape = self.node.outputs[i].shape
        assert shape is not None
        return tuple(int(d) for d in shape)  # type: ignore[arg-type]

    def out_dtype(self, i: int = 0) -> str:
        """NumPy dtype name the graph declares for output ``i``."""
        dtype = self.node.outputs[i].dtype
        assert dtype is not None
        return str(dtype.numpy())

    def constant(self, i: int) -> Array | None:
        """Value of input ``i`` if it is known at compile time, else None."""
        if not self.has(i) or not isinstance(self.inputs[i], GenericConst):
            return None
        value: Array = self.inputs[i].value.numpy()  # type: ignore[union-attr]
        return value

    def static(self, i: int, what: str) -> Array:
        """Value of input ``i``; raises Unsupported when it is computed at run time."""
        value = self.constant(i)
        if value is None:
            raise self.unsupported(
                f"'{what}' is computed at run time", "make it a constant of the model"
            )
        return value

    def tensor(self, i: int) -> Expr:
        """Input ``i``, never as a Scalar: for converters that index it by rank."""
        return self.as_tensor(self.inputs[i])

    def as_tensor(self, x: Expr) -> Expr:
        """``x``, never as a Scalar."""
        if isinstance(x, GenericConst) and product(shape_of_expr(x)) == 1:
            return Buffer(x)
        return x

    def unsupported(self, text: str, fix: str | None = None) -> Unsupported:
        """The error to raise: names the op and the feature."""
        return Unsupported(f"Op {self.type}: {text}", where=self.node.name or None, fix=fix)

    def te(self, function: Callable[..., Any], *arguments: Any) -> Expr:
        """Emit ``function(*te tensors)`` as a kernel call.

        One-element constants arrive as ``Scalar``, None stays None, everything else as a TE
        tensor. Returns a Relax variable (of tuple type where ``function`` returns a list).
        """
        passed: list[Any] = []
        slots: list[Any] = []
        for argument in arguments:
            scalar = _as_scalar(argument)
            if scalar is not None or argument is None:
                slots.append(scalar)
            else:
                slots.append(len(passed))
                passed.append(argument.expr if isinstance(argument, Buffer) else argument)

        def call(*tensors: Any) -> Any:
            return function(*[tensors[s] if isinstance(s, int) else s for s in slots])

        # The audit knows integer kernels by their name.
        prefix = "integer_" if self.node.domain == DOMAIN else ""
        return self.bb.emit_te(call, *passed, primfunc_name_hint=prefix + self.type.lower())

    def compute(self, dtype_shape: tuple[int, ...], f: Callable[..., Any], *args: Any) -> Expr:
        """Emit one injective kernel: ``f(index tuple, *tensors)`` for every output element."""
        return self.te(
            lambda *tensors: te.compute(dtype_shape, lambda *i: f(i, *tensors), name="out"), *args
        )

    def const(self, array: Array) -> Expr:
        """A constant tensor."""
        return constant_of(array)

    def reshape(self, x: Expr, shape: Sequence[int]) -> Expr:
        """``x`` with another shape and the same row-major data (no copy after planning)."""
        if shape_of_expr(x) == tuple(shape):
            return x
        if isinstance(x, GenericConst):
            return self.const(x.value.numpy().reshape(tuple(shape)))
        return self.bb.emit(relax.op.reshape(x, tuple(shape)))

    def item(self, x: Expr, i: int) -> Expr:
        """Element ``i`` of a tuple expression."""
        return self.bb.emit(relax.TupleGetItem(x, i))


def shape_of_expr(x: Expr) -> tuple[int, ...]:
    """Static shape of a Relax expression."""
    return tuple(int(d) for d in x.ty.shape)


def dtype_of_expr(x: Expr) -> str:
    """NumPy dtype name of a Relax expression."""
    return str(x.ty.dtype)


def constant_of(array: Array) -> Expr:
    """A Relax constant of exactly the array's dtype."""
    # relax.const given an array would make int64 int32 and float64 float32.
    return relax.const(tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape)))


def axis_of(axis: int, rank: int) -> int:
    """``axis`` counted from the front."""
    return axis + rank if axis < 0 else axis


def _as_scalar(argument: Any) -> Scalar | None:
    if not isinstance(argument, GenericConst) or product(shape_of_expr(argument)) != 1:
        return None
    value = argument.value.numpy()
    # Ranks above 0 matter for the result's shape, which converters take from the graph.
    return Scalar(value.reshape(()).item(), str(value.dtype))
