"""A model without its weights, for onnx functions that serialize whatever they are given."""

from __future__ import annotations

import onnx

# Bytes. Tensors that decide shapes (axes, pads, sizes) are far smaller, weights mostly larger.
_HEAVY = 4096


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``proto`` in which large initializers have become inputs of their type and shape.

    The checker and shape inference judge both alike, but copy 100 MB of weights several times.
    """
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.graph.name = proto.graph.name
    light.graph.node.extend(proto.graph.node)
    light.graph.input.extend(proto.graph.input)
    light.graph.output.extend(proto.graph.output)
    for tensor in proto.graph.initializer:
        if len(tensor.raw_data) > _HEAVY:
            stand_in = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            light.graph.input.append(stand_in)
        else:
            light.graph.initializer.append(tensor)
    return light
