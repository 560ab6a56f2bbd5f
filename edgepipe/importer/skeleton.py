"""A model without its weights, which everything that reads or copies the graph takes."""

from __future__ import annotations

import numpy as np
import onnx

from edgepipe.importer.checks import check_tensor
from edgepipe.onnx_parts import HEAVY, is_apart, put_apart

#: Element types that NumPy and ONNX Runtime store alike.
_PLAIN = frozenset(
    onnx.TensorProto.DataType.Value(name)
    for name in ("FLOAT", "FLOAT16", "DOUBLE", "INT8", "UINT8", "INT16", "UINT16", "INT32", "INT64")
)


def take_weights(
    proto: onnx.ModelProto, where: str
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A copy of ``proto``, which is spoilt, without its heavy initializers, and their arrays.

    Raises UserError where a tensor does not hold what its shape says.
    """
    weights, kept = {}, []
    for tensor in proto.graph.initializer:
        if tensor.data_type in _PLAIN and _heavy(tensor):
            check_tensor(tensor, where)
            array = onnx.numpy_helper.to_array(tensor)
            array.flags.writeable = False
            weights[tensor.name] = array
            kept.append(put_apart(tensor))
        else:
            kept.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    return light, weights


def _heavy(tensor: onnx.TensorProto) -> bool:
    return max(len(tensor.raw_data), 4 * len(tensor.float_data)) > HEAVY


def without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``proto`` in which weights that are apart have become inputs of their type and
    shape: the checker and shape inference judge both alike."""
    light = onnx.ModelProto(ir_version=proto.ir_version)
    light.opset_import.extend(proto.opset_import)
    light.graph.name = proto.graph.name
    light.graph.node.extend(proto.graph.node)
    light.graph.input.extend(proto.graph.input)
    light.graph.output.extend(proto.graph.output)
    for tensor in proto.graph.initializer:
        if is_apart(tensor) or len(tensor.raw_data) > HEAVY:
            stand_in = onnx.helper.make_tensor_value_info(
                tensor.name, tensor.data_type, list(tensor.dims)
            )
            light.graph.input.append(stand_in)
        else:
            light.graph.initializer.append(tensor)
    return light
