"""Static shapes and dtypes of every value, node by node, by the operators' own ONNX schemas.

Node by node, because constants found on the way (a Reshape target that was just folded) are then
used at once, and because after an edit only the new nodes need it.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import defs, shape_inference

from edgepipe.errors import UserError
from edgepipe.passes.editor import OPSET, array_of, shape_of

# Constants that decide a shape (axes, pads, sizes, repeats) are short; weights are not looked at.
_MAX_DATA = 4096


def infer_node(node: ir.Node, opset: int = OPSET) -> None:
    """Set shape and dtype of the outputs of ``node`` from its inputs. Subgraphs are not entered.

    Raises UserError where the inputs contradict the operator's definition.
    """
    if node.domain not in ("", "ai.onnx") or any(_has_graph(a) for a in node.attributes.values()):
        return
    if not defs.has(node.op_type, opset, ""):
        opset = defs.onnx_opset_version()  # the few kept operators that are newer
        if not defs.has(node.op_type, opset, ""):
            return
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for value in node.inputs:
        if value is None or not value.name:
            continue
        if value.type is None:
            return
        proto = onnx.TypeProto()
        ir.serde.serialize_type_into(proto, value.type)
        if value.shape is not None:
            ir.serde.serialize_shape_into(proto, value.shape)
        types[value.name] = proto
        array = array_of(value)
        if array is not None and array.size <= _MAX_DATA and array.ndim <= 1:
            data[value.name] = ir.serde.serialize_tensor(value.const_value)  # type: ignore[arg-type]
    try:
        found = _infer(node, opset, types, data)
    except (shape_inference.InferenceError, RuntimeError) as error:
        reason = str(error).replace("[ShapeInferenceError]", "").replace("[TypeInferenceError]", "")
        raise UserError(
            f"the inputs do not fit the operator: {reason.strip()}",
            where=f"{node.op_type} '{node.name or node.outputs[0].name}'",
            fix="check the model with onnx.checker.check_model(model, full_check=True)",
        ) from None
    for value in node.outputs:
        if value.name and value.name in found:
            _assign(value, found[value.name])
    if node.op_type == "GroupNormalization":  # the one current operator without inference
        first = node.inputs[0]
        if first is not None:
            node.outputs[0].type, node.outputs[0].shape = first.type, first.shape


def _infer(
    node: ir.Node,
    opset: int,
    types: dict[str, onnx.TypeProto],
    data: dict[str, onnx.TensorProto],
) -> dict[str, onnx.TypeProto]:
    proto = ir.serde.serialize_node(node)
    if node.op_type == "ConvTranspose":
        _cut_output_padding(proto, shape_of(node.inputs[1]))
    newest = defs.onnx_opset_version()
    while True:
        schema = defs.get_schema(node.op_type, opset, "")
        imports = [onnx.helper.make_opsetid("", opset)]
        try:
            return dict(
                shape_inference.infer_node_outputs(
                    schema, proto, types, data, opset_imports=imports
                )
            )
        except onnx.checker.ValidationError as error:
            if opset == newest:
                raise RuntimeError(str(error)) from None
            opset = newest  # later versions of many operators only add element types


def _cut_output_padding(proto: onnx.NodeProto, weight: tuple[int, ...] | None) -> None:
    """With auto_pad SAME_* the output is at most input · stride, as padding makes room for all of
    ``output_padding`` that goes beyond (ONNX Runtime); the schema's inference adds all of it."""
    given = {a.name: a for a in proto.attribute}
    if "output_padding" not in given or weight is None or "auto_pad" not in given:
        return
    extra, rank = given["output_padding"].ints, len(weight) - 2
    strides, dilations = (
        given[name].ints if name in given else [1] * rank for name in ("strides", "dilations")
    )
    if given["auto_pad"].s.startswith(b"SAME"):
        for i, (k, stride, dilation) in enumerate(zip(weight[2:], strides, dilations, strict=True)):
            extra[i] = min(extra[i], max(0, stride - (k - 1) * dilation - 1))


def _assign(value: ir.Value, proto: onnx.TypeProto) -> None:
    found_type = ir.serde.deserialize_type_proto_for_type(proto)
    found_shape = ir.serde.deserialize_type_proto_for_shape(proto)
    if found_type is not None:
        value.type = found_type
    if found_shape is None:
        return
    # What the model said stays only where it says more than the operator's definition does.
    if shape_of(value) is None or all(isinstance(d, int) for d in found_shape):
        value.shape = found_shape


def _has_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def unknown(model: ir.Model) -> list[ir.Value]:
    """Values that something reads and whose static shape or dtype is not known."""
    return [
        value
        for graph in model.graphs()
        for node in graph
        for value in node.outputs
        if (value.uses() or value.is_graph_output())
        and (value.dtype is None or shape_of(value) is None)
    ]
