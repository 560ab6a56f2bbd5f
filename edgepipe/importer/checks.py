"""What can be wrong with an ONNX graph, found before any stage stumbles over it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import onnx

from edgepipe.errors import Unsupported, UserError
from edgepipe.importer.node_checks import STANDARD, check_node
from edgepipe.importer.order import order_nodes

#: The oldest opset the importer takes, and the newest: what the installed onnx package defines.
MIN_OPSET = 7
MAX_OPSET = onnx.defs.onnx_opset_version()
#: The largest tensor: WebAssembly and 32-bit Arm address no more in one piece.
MAX_TENSOR_BYTES = 2**31

_BITS = {
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 64),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("INT4", "UINT4", "FLOAT4E2M1"), 4),
    **dict.fromkeys(("INT2", "UINT2"), 2),
    "COMPLEX128": 128,
}
#: Element type → the field that has its numbers where they are not raw bytes.
_TYPED = {
    **dict.fromkeys(("INT32", "INT16", "INT8", "UINT16", "UINT8", "BOOL"), "int32_data"),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT4", "UINT4", "INT2", "UINT2"), "int32_data"),
    **dict.fromkeys(("UINT32", "UINT64"), "uint64_data"),
    "FLOAT": "float_data", "DOUBLE": "double_data", "INT64": "int64_data",
}  # fmt: skip


def check(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Check ``proto`` and return it with local functions inlined and nodes in order.

    Raises UserError for an opset out of range, an unknown operator, duplicate or undefined
    names, a cycle and impossible dimensions; Unsupported for foreign operator domains, sparse
    initializers and inputs that are not tensors.
    """
    _check_text(proto, where)
    _check_opset(proto, where)
    if proto.functions:
        proto = _inline_functions(proto, where)
    for graph in graphs(proto.graph):
        _check_graph(graph, opset_version(proto), where)
    if not proto.graph.output:
        raise UserError("the graph has no outputs", where=where, fix="export the model again")
    for output in proto.graph.output:
        kind = output.type.WhichOneof("value")
        if kind not in (None, "tensor_type"):
            raise Unsupported(f"is not a tensor ({kind})", where=f"{where}, output '{output.name}'")
    order_nodes(proto.graph, frozenset(), where)
    return proto


def run_checker(proto: onnx.ModelProto, where: str) -> None:
    """Let onnx's own checker judge attributes, arity and what else ``check`` leaves out."""
    # It insists on output shapes, which exporters leave out and inference finds.
    tensors = [o.type.tensor_type for o in proto.graph.output]
    shapeless = [t for t in tensors if not t.HasField("shape")]
    for tensor in shapeless:
        tensor.shape.CopyFrom(onnx.TensorShapeProto())
    try:
        onnx.checker.check_model(proto)
    except (onnx.checker.ValidationError, ValueError) as error:
        if "is deprecated in domain_version" not in str(error):  # judged by _check_operator
            text = f"not a valid ONNX model: {first_line(error)}"
            raise UserError(text, where=where) from None
    finally:
        for tensor in shapeless:
            tensor.ClearField("shape")


def first_line(error: BaseException) -> str:
    """The telling first line of another library's error text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def opset_version(proto: onnx.ModelProto) -> int:
    """The version of the standard operator set ``proto`` imports (0 when it imports none)."""
    versions: list[int] = [o.version for o in proto.opset_import if o.domain in STANDARD]
    return max(versions, default=0)


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """``graph`` and all its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)
            for subgraph in attribute.graphs:
                yield from graphs(subgraph)


def tensor_bytes(tensor: onnx.TensorProto, where: str) -> int:
    """Bytes ``tensor`` needs in raw form; UserError when its dimensions are impossible."""
    if any(dim < 0 for dim in tensor.dims):
        raise UserError(f"negative dimension in {list(tensor.dims)}", where=where)
    bits = _BITS.get(type_name(tensor.data_type), 8)
    size: int = (math.prod(tensor.dims) * bits + 7) // 8
    if size > MAX_TENSOR_BYTES:
        raise UserError(
            f"shape {list(tensor.dims)} needs {size / 2**30:.1f} GiB; the limit is 2 GiB",
            where=where,
        )
    return size


def type_name(data_type: int) -> str:
    """ONNX's name of an element type; UNDEFINED for numbers it does not know."""
    known = data_type in onnx.TensorProto.DataType.values()
    return str(onnx.TensorProto.DataType.Name(data_type)) if known else "UNDEFINED"


def _check_text(proto: onnx.ModelProto, where: str) -> None:
    """Protobuf hands out strings that are not UTF-8 as bytes, which nothing after it expects."""
    messages: list[Any] = [proto]
    while messages:
        message = messages.pop()
        texts: list[object] = []
        if isinstance(message, onnx.AttributeProto):  # its strings are bytes in any case
            texts += map(_decoded, (message.s, *message.strings))
        if isinstance(message, onnx.TensorProto):  # listing its fields would copy its numbers
            texts += (message.name, message.doc_string)
            messages += (*message.external_data, *message.metadata_props)
            fields = []
        else:
            fields = message.ListFields()
        for field, value in fields:
            single = isinstance(value, str | bytes) or hasattr(value, "ListFields")
            values = [value] if single else value
            if field.type == field.TYPE_STRING:
                texts += values
            elif field.type == field.TYPE_MESSAGE:
                messages += values
        if any(isinstance(text, bytes) for text in texts):
            raise UserError(
                "has names, attributes or remarks that are not valid text",
                where=where,
                fix="export it again",
            )


def _decoded(text: bytes) -> str | bytes:
    """A string attribute."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text


def _check_opset(proto: onnx.ModelProto, where: str) -> None:
    version = opset_version(proto)
    if version == 0:
        others = ", ".join(sorted({o.domain for o in proto.opset_import}))
        raise Unsupported(
            f"imports only operators of {others}, not of the standard domain",
            where=where,
            fix="export the model with standard operators",
        )
    if version < MIN_OPSET:
        raise UserError(
            f"opset {version} is too old; edgepipe reads {MIN_OPSET} to {MAX_OPSET}",
            where=where,
            fix=f"export the model again with opset_version={max(MIN_OPSET, 17)}",
        )
    if version > MAX_OPSET:
        raise UserError(
            f"opset {version} is too new; edgepipe reads {MIN_OPSET} to {MAX_OPSET}",
            where=where,
            fix="export the model again with opset_version=21",
        )
    if proto.ir_version > onnx.IR_VERSION:
        raise UserError(
            f"IR version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest known",
            where=where,
            fix="export the model with an older onnx, or update onnx",
        )


def _inline_functions(proto: onnx.ModelProto, where: str) -> onnx.ModelProto:
    import onnx.inliner

    try:
        return onnx.inliner.inline_local_functions(proto, convert_version=True)
    except Exception as error:  # pybind raises plain RuntimeError, TypeError and its own types
        raise UserError(
            f"cannot inline the model's functions: {first_line(error)}", where=where
        ) from None


def check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Whether a tensor holds as many bytes or numbers as its shape says."""
    here = f"{where}, tensor '{tensor.name}'"
    size, kind = tensor_bytes(tensor, here), type_name(tensor.data_type)
    if tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size:
            raise UserError(
                f"holds {len(tensor.raw_data)} bytes, shape {list(tensor.dims)} needs {size}",
                where=here,
                fix="export the model again",
            )
    elif kind in _TYPED:
        per_number = {4: 2, 2: 4}.get(_BITS.get(kind, 8), 1)
        wanted = -(-math.prod(tensor.dims) // per_number)
        if (found := len(getattr(tensor, _TYPED[kind]))) != wanted:
            raise UserError(
                f"holds {found} numbers, shape {list(tensor.dims)} needs {wanted}",
                where=here,
                fix="export the model again",
            )


def _check_graph(graph: onnx.GraphProto, version: int, where: str) -> None:
    if graph.sparse_initializer:
        raise Unsupported("sparse initializers are not supported", where=where, fix="store dense")
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type.elem_type
        if kind not in onnx.TensorProto.DataType.values():
            raise UserError(f"'{value.name}' has elements of type {kind}, which is none",
                            where=where, fix="export the model again")  # fmt: skip
    attributes = (a for node in graph.node for a in node.attribute)
    for tensor in (*graph.initializer, *(t for a in attributes for t in (a.t, *a.tensors))):
        check_tensor(tensor, where)
    for node in graph.node:
        check_node(node, version, where)
        node.ClearField("device_configurations")  # how to share it among devices: there is one
    for what, names in (
        ("input", [i.name for i in graph.input]),
        ("output", [o.name for o in graph.output]),
        ("initializer", [t.name for t in graph.initializer]),
    ):
        for name in _duplicates(names):
            raise UserError(f"two {what}s are named '{name}'", where=where)
    written = [t.name for t in graph.initializer]
    written += [i.name for i in graph.input if i.name not in set(written)]
    written += [name for node in graph.node for name in node.output if name]
    for name in _duplicates(written):
        raise UserError(f"'{name}' is produced twice", where=where, fix="names must be unique")
    _check_passed_on(graph, where)


def _check_passed_on(graph: onnx.GraphProto, where: str) -> None:
    """An output that is an input, too, is declared twice."""
    inputs = {value.name: value for value in graph.input}
    for output in (o for o in graph.output if o.name in inputs):
        given = inputs[output.name].type
        pair = [list(t.tensor_type.shape.dim) for t in (given, output.type)]
        known = all(t.tensor_type.HasField("shape") for t in (given, output.type))
        sizes = [(a.dim_value, b.dim_value) for a, b in zip(*pair, strict=False)]
        differ = len(pair[0]) != len(pair[1]) or any(a != b and a > 0 and b > 0 for a, b in sizes)
        if (known and differ) or given.tensor_type.elem_type != output.type.tensor_type.elem_type:
            raise UserError(f"'{output.name}' is an input and an output of different types",
                            where=where, fix="export the model again")  # fmt: skip


def _duplicates(names: list[str]) -> list[str]:
    seen: set[str] = set()
    return [n for n in names if n in seen or seen.add(n)]  # type: ignore[func-returns-value]
