"""Tables that indices look rows up in, and what of all weights stays float.

Gather(table) → Gather(codes) → DequantizeLinear with a scale per column: the table is the better
part of a text model's size, and nothing multiplies by it.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from edgepipe.onnx_session import OPSET
from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.edit import Names, initializer
from edgepipe.quantization.graph import constant, dims, is_op, name_of
from edgepipe.quantization.remarks import Note

#: Smaller tables and constants are not worth a node or a word.
SMALLEST = 1024
_LIMIT = 127


def quantize(graph: ir.Graph, config: QuantConfig, note: Note) -> None:
    """Give every table of ``graph`` [rows, columns] that only lookups read 8-bit codes."""
    names = Names(graph)
    for value in list(graph.initializers.values()):
        readers = [use.node for use in value.uses()]
        if readers and all(_looks_up(node, value) for node in readers):
            formats = [config.format_of(node.name or "", "Gather") for node in readers]
            if None not in formats and not value.is_graph_output():
                _quantize(graph, value, readers, names)
                note(value.name, "its rows are 8-bit codes with a scale per column")


def warn_of_floats(graph: ir.Graph, note: Note) -> None:
    """Say so where most weights of a quantized graph are still float."""
    floats, codes = Counter[str](), 0
    for value in graph.initializers.values():
        size = int(np.prod(dims(value) or ()))
        if size < SMALLEST:
            continue
        if value.dtype == ir.DataType.FLOAT:
            floats.update({use.node.op_type: size for use in tuple(value.uses())[:1]})
        elif value.dtype is not None and value.dtype.bitwidth <= 8:
            codes += size
    share = codes / max(codes + floats.total(), 1)
    if share < 0.5 and floats:
        kinds = ", ".join(kind for kind, _ in floats.most_common(3))
        note(
            "weights",
            f"only {share:.0%} of them are quantized; float32 are those of {kinds}",
            doubt=True,
        )


def _looks_up(node: ir.Node, value: ir.Value) -> bool:
    array = constant(value)
    return (
        is_op(node, "Gather")
        and node.inputs[0] is value
        and node.attributes.get_int("axis", 0) == 0
        and array is not None
        and array.dtype == np.float32
        and array.ndim == 2
        and array.size >= SMALLEST
        and bool(np.isfinite(array).all())
    )


def _quantize(graph: ir.Graph, value: ir.Value, readers: list[ir.Node], names: Names) -> None:
    table = constant(value)
    assert table is not None
    peak = np.abs(table.astype(np.float64)).max(0)
    scale = np.maximum(peak / _LIMIT, float(np.finfo(np.float32).tiny) * 256).astype(np.float32)
    integers = np.clip(np.rint(table / scale), -_LIMIT, _LIMIT).astype(np.int8)
    stem = name_of(value)
    held = [
        initializer(graph, array, names.fresh(f"{stem}/{what}"))
        for array, what in ((integers, "codes"), (scale, "scale"))
    ]
    for node in readers:
        output = node.outputs[0]
        node.replace_input_with(0, held[0])
        restore = ir.node("DequantizeLinear", [output, held[1]], {"axis": -1}, version=OPSET)
        result = restore.outputs[0]
        restore.name = names.fresh(f"{node.name}/restored")
        result.name, output.name = output.name, names.fresh(f"{output.name}/codes")
        result.shape, result.type = output.shape, output.type
        output.type = ir.TensorType(ir.DataType.INT8)
        for use in tuple(output.uses()):
            if use.node is not restore:
                use.node.replace_input_with(use.idx, result)
        for index, other in enumerate(graph.outputs):
            if other is output:
                graph.outputs[index] = result
        graph.insert_after(node, restore)
    graph.initializers.pop(stem)
