"""A static-shape ONNX graph as one Relax function of kernel calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from edgepipe.errors import EdgepipeError, Unsupported
from edgepipe.lowering import converters
from edgepipe.lowering.converters import integers
from edgepipe.lowering.converters.op import Op, constant_of, dtype_of_expr, product, shape_of_expr
from edgepipe.lowering.integers.terms import DOMAIN

#: Emits a node of domain ``edgepipe``: (block builder, node, inputs) → outputs.
EmitKernel = Callable[[Any, ir.Node, list[Any]], list[Any]]

_STANDARD = ("", "ai.onnx")
_DTYPES = frozenset(
    {
        *("float16", "float32", "float64", "bool"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    }
)


def to_relax(model: ir.Model, emit_kernel: EmitKernel | None = None) -> Any:
    """Return a ``tvm.IRModule`` whose ``main`` computes ``model``.

    Every value must have a static shape and a dtype. ``main`` takes the model inputs in order
    (not those with an initializer) and returns the tuple of the outputs in order; initializers
    become constants. Nodes of domain ``edgepipe`` go to ``emit_kernel``. Raises Unsupported,
    naming the op and the feature, for everything that would not compile or not be right.
    """
    graph = model.graph
    bb = relax.BlockBuilder()
    values: dict[ir.Value, Any] = {}
    params = []
    for i, value in enumerate(v for v in graph.inputs if v.name not in graph.initializers):
        shape, dtype = _tensor_type(value)
        values[value] = relax.Var(_identifier(value.name, i), relax.TensorType(shape, dtype))
        params.append(values[value])
    for initializer in graph.initializers.values():
        values[initializer] = constant(initializer.const_value, initializer.name)
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    with bb.function("main", params):
        with bb.dataflow():
            failure: EdgepipeError | None = None
            try:
                for node in _topological(graph):
                    _convert_node(node, values, bb, opset, emit_kernel)
                outputs = [_computed(values, v) for v in graph.outputs]
            except EdgepipeError as error:
                failure, outputs = error, []
            # An unfinished block would print a warning of TVM's when it is dropped.
            result = bb.emit_output(relax.Tuple(outputs))
        bb.emit_func_output(result)
    if failure is not None:
        raise failure
    return bb.get()


def constant(tensor: Any, name: str | None) -> Any:
    """A tensor of the model as a Relax constant; 4-bit integers become 8-bit ones."""
    if tensor is None:
        raise Unsupported("constant without a value", where=name)
    array = tensor.numpy()
    if array.dtype.name in ("int4", "int2"):
        array = array.astype(np.int8)
    elif array.dtype.name in ("uint4", "uint2"):
        array = array.astype(np.uint8)
    if str(array.dtype) not in _DTYPES:
        raise Unsupported(f"tensor type {array.dtype} is not supported", where=name)
    return constant_of(array)


def _convert_node(
    node: ir.Node, values: dict[ir.Value, Any], bb: Any, opset: int, emit_kernel: EmitKernel | None
) -> None:
    """Convert one node and enter its outputs into ``values``."""
    try:
        inputs = [None if v is None else _computed(values, v) for v in node.inputs]
        if node.domain == "edgepipe":
            if emit_kernel is None:
                raise Unsupported(f"Op edgepipe.{node.op_type} needs a kernel", where=node.name)
            results = emit_kernel(bb, node, inputs)
        elif node.domain == DOMAIN:
            results = [integers.convert(Op(node, bb, inputs, opset))]
        else:
            results = _convert_standard(node, inputs, bb, opset)
        for value, result in zip(node.outputs, results, strict=False):
            if value.name:
                _check_type(node, value, result)
                values[value] = result
    except EdgepipeError:
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise Unsupported(
            f"Op {node.op_type}: no conversion for this form "
            f"({type(error).__name__}: {first[:200]})",
            where=node.name or None,
        ) from error


def _computed(values: dict[ir.Value, Any], value: ir.Value) -> Any:
    if value not in values:
        raise Unsupported("no kernel computes this value", where=value.name)
    return values[value]


def _convert_standard(node: ir.Node, inputs: list[Any], bb: Any, opset: int) -> list[Any]:
    if node.domain not in _STANDARD:
        raise Unsupported(f"Op {node.domain}.{node.op_type} is not known", where=node.name or None)
    converter = converters.find(node.op_type)
    if converter is None:
        reason = converters.REFUSED.get(node.op_type, "it is not implemented")
        raise Unsupported(f"Op {node.op_type} is not supported: {reason}", where=node.name or None)
    types = [_tensor_type(v) for v in node.outputs if v.name]
    if types and all(product(shape) == 0 for shape, _ in types):
        return [constant_of(np.zeros(*_tensor_type(v))) if v.name else None for v in node.outputs]
    results = converter(Op(node, bb, inputs, opset))
    return list(results) if isinstance(results, list | tuple) else [results]


def _check_type(node: ir.Node, value: ir.Value, result: Any) -> None:
    """A converter that disagrees with ONNX shape inference must not go unnoticed."""
    declared = _tensor_type(value)
    got = (shape_of_expr(result), dtype_of_expr(result))
    if declared != got:
        raise Unsupported(
            f"Op {node.op_type}: result is {got[1]}{list(got[0])} where the graph says "
            f"{declared[1]}{list(declared[0])}",
            where=node.name or value.name,
        )


def _tensor_type(value: ir.Value) -> tuple[tuple[int, ...], str]:
    """Static shape and NumPy dtype name of ``value``."""
    if value.shape is None or any(not isinstance(d, int) for d in value.shape):
        raise Unsupported(
            "shape is not static", where=value.name, fix="fix its dimensions with --shape"
        )
    name = "undefined" if value.dtype is None else value.dtype.name.lower()
    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    if dtype not in _DTYPES:
        raise Unsupported(f"tensor type {dtype} is not supported", where=value.name)
    return tuple(int(d) for d in value.shape), dtype  # type: ignore[arg-type]


def _topological(graph: ir.Graph) -> list[ir.Node]:
    """Nodes in execution order, without touching the caller's graph."""
    done = {*graph.inputs, *graph.initializers.values()}
    pending, order = list(graph), []
    while pending:
        later = []
        for node in pending:
            if all(v is None or v in done for v in node.inputs):
                order.append(node)
                done.update(node.outputs)
            else:
                later.append(node)
        if len(later) == len(pending):
            missing = next(v for n in later for v in n.inputs if v is not None and v not in done)
            raise Unsupported("no node computes this value", where=missing.name)
        pending = later
    return order


def _identifier(name: str | None, index: int) -> str:
    text = "".join(c if c.isascii() and c.isalnum() else "_" for c in name or "")
    return f"p{index}_{text}"


__all__ = ["EmitKernel", "constant", "to_relax"]
