"""Attention and dense layers of transformers, written so that integers get through.

1. ONNX's MatMul has no bias, so torch's linear layers over [batch, tokens, channels] come as MatMul
   and Add. Written as Gemm over rows the bias joins the int32 accumulator, and what follows reads
   codes.
2. A scalar that multiplies an operand of a product of two activations multiplies the product
   instead: the operand then is codes already, and the scalar joins the product's scale.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.onnx_session import OPSET
from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.edit import Names, initializer
from edgepipe.quantization.graph import Array, bounds, constant, dims, is_op, only_user
from edgepipe.quantization.interpreter import scalar_factor
from edgepipe.quantization.placement import TABLES, weight_of
from edgepipe.quantization.remarks import Note


def rewrite(graph: ir.Graph, config: QuantConfig, note: Note) -> None:
    """Write every MatMul by constants with an Add of a vector behind it as Reshape, Gemm, Reshape,
    and move scalars behind products.

    Functions of one value between the Add and the next operator stay right behind the Gemm. A
    MatMul to which ``config`` gives a format that a Gemm would not get stays.
    """
    names = Names(graph)
    count = 0
    for node in list(graph):
        if not is_op(node, "MatMul"):
            continue
        if weight_of(node) is None:
            _scalar_behind(graph, node)
        elif config.format_of(node.name or "", "MatMul") == config.format_of(
            node.name or "", "Gemm"
        ):
            count += _with_bias(graph, node, names)
    if count:
        note(None, f"{count} dense layers take their bias into the accumulator")


def _with_bias(graph: ir.Graph, node: ir.Node, names: Names) -> bool:
    add, source = only_user(node.outputs[0]), node.inputs[0]
    shape = None if source is None else dims(source)
    if add is None or source is None or shape is None or len(shape) < 3:
        return False
    bias = _bias(add, node)
    if bias is None:
        return False
    rows = int(np.prod(shape[:-1]))
    flat = _reshape(graph, source, (rows, shape[-1]), names)
    weight, held = node.inputs[1], initializer(graph, bias, names.fresh(f"{node.name}/bias"))
    gemm = ir.Node("", "Gemm", [flat.outputs[0], weight, held], name=node.name, version=OPSET)
    last = add
    chain: list[ir.Node] = []
    while (after := only_user(last.outputs[0])) is not None and _of_one_value(after):
        chain.append(after)
        last = after
    output = last.outputs[0]
    full = dims(output)
    assert full is not None
    readers = tuple(output.uses())
    product = gemm.outputs[0]
    product.name, product.type = names.fresh(f"{add.outputs[0].name}/rows"), output.type
    product.shape = ir.Shape((rows, full[-1]))
    first = chain[0] if chain else None
    if first is not None:
        first.replace_input_with(0, product)
        for each in chain:
            each.outputs[0].shape = product.shape
    turned = _reshape(graph, output if chain else product, full, names)
    for use in readers:
        use.node.replace_input_with(use.idx, turned.outputs[0])
    if output.is_graph_output():
        name = output.name
        output.name, turned.outputs[0].name = turned.outputs[0].name, name
        for index, value in enumerate(graph.outputs):
            if value is output:
                graph.outputs[index] = turned.outputs[0]
    graph.insert_before(node, [flat, gemm])
    graph.insert_after(last, turned)
    for old in (add, node):
        for index in range(len(old.inputs)):
            old.replace_input_with(index, None)
        graph.remove(old)
    return True


def _scalar_behind(graph: ir.Graph, node: ir.Node) -> None:
    """MatMul(x · c, y) → MatMul(x, y) · c."""
    for index, value in enumerate(node.inputs):
        scale = value.producer() if value is not None else None
        if value is None or scale is None or scalar_factor(scale) is None:
            continue
        output = node.outputs[0]
        if only_user(value) is not node or output.is_graph_output():
            continue
        readers = tuple(output.uses())
        node.replace_input_with(index, scale.inputs[0])
        scale.replace_input_with(0, output)
        for use in readers:
            use.node.replace_input_with(use.idx, value)
        value.shape = output.shape
        graph.remove(scale)
        graph.insert_after(node, scale)


def _bias(add: ir.Node, product: ir.Node) -> Array | None:
    """The vector that ``add`` adds to every row of ``product``, None if it does something else."""
    if not is_op(add, "Add") or dims(add.outputs[0]) != dims(product.outputs[0]):
        return None
    other = add.inputs[1] if add.inputs[0] is product.outputs[0] else add.inputs[0]
    array, shape = constant(other), dims(product.outputs[0])
    if array is None or shape is None or array.dtype != np.float32:
        return None
    row = array.size == shape[-1] and array.shape[-1:] == shape[-1:]
    return array.reshape(-1) if row else None


def _of_one_value(node: ir.Node) -> bool:
    return is_op(node, *TABLES) or bounds(node) is not None


def _reshape(graph: ir.Graph, source: ir.Value, shape: tuple[int, ...], names: Names) -> ir.Node:
    target = initializer(graph, np.array(shape, np.int64), names.fresh(f"{source.name}/shape"))
    node = ir.Node("", "Reshape", [source, target], version=OPSET)
    value = node.outputs[0]
    value.name = names.fresh(f"{source.name}/as_{'x'.join(map(str, shape))}")
    node.name = names.fresh(f"{value.name}/Reshape")
    value.shape, value.type = ir.Shape(shape), source.type
    return node
