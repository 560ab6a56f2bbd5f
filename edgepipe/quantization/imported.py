"""Models that come in quantized: Q/DQ nodes say which format the file already has."""

from __future__ import annotations

import onnx_ir as ir

from edgepipe.quantization.graph import is_op

_BYTES = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4))
_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
#: What exporters put between a restored weight and its reader.
_MOVES = ("Reshape", "Transpose", "Identity", "Cast", "Squeeze", "Unsqueeze")


def implied_format(model: ir.Model) -> str | None:
    """The recipe line that the Q/DQ nodes of an imported model amount to; None for a float model.

    Activations count where a QuantizeLinear and a DequantizeLinear of at most 8 bits follow each
    other, weights where a DequantizeLinear of constants feeds a linear operator. The narrowest
    weights name the format. Models whose activations have 16 bits are float models with
    roundings in them: no kernel computes their products in integers.
    """
    weights: list[ir.Node] = []
    rounds_activations = False
    for node in model.graph.all_nodes():
        if not is_op(node, "DequantizeLinear") or node.inputs[0] is None:
            continue
        kind = _kind(node)
        if _constant(node.inputs[0]):
            if kind in _BYTES and _feeds_linear(node.outputs[0]):
                weights.append(node)
        elif is_op(node.inputs[0].producer(), "QuantizeLinear"):
            if kind not in _BYTES:
                return None
            rounds_activations = True
    bits = 4 if any(_kind(n) in (ir.DataType.INT4, ir.DataType.UINT4) for n in weights) else 8
    if rounds_activations:
        return f"w{bits}a8"
    if not weights:
        return None
    blocks = {n.attributes.get_int("block_size", 0) for n in weights} - {0}
    return f"w{bits}g{max(blocks)}" if blocks else f"w{bits}a16"


def _kind(node: ir.Node) -> ir.DataType | None:
    """The type of the codes: where inference has not told it, the zero point's."""
    source = node.inputs[0]
    assert source is not None
    if source.dtype is not None:
        return source.dtype
    for reader in (node, source.producer()):
        if reader is not None and len(reader.inputs) > 2 and reader.inputs[2] is not None:
            return reader.inputs[2].dtype
    return ir.DataType.UINT8


def _constant(value: ir.Value) -> bool:
    """Whether no data reach ``value``: an initializer, or a QuantizeLinear of one."""
    producer = value.producer()
    if producer is None:
        return value.const_value is not None and not value.is_graph_input()
    if is_op(producer, "Constant"):
        return True
    first = producer.inputs[0] if producer.inputs else None
    return is_op(producer, "QuantizeLinear", *_MOVES) and first is not None and _constant(first)


def _feeds_linear(value: ir.Value) -> bool:
    for node, index in value.uses():
        if is_op(node, *_LINEAR) and index < 2:
            return True
        if is_op(node, *_MOVES) and _feeds_linear(node.outputs[0]):
            return True
    return False
