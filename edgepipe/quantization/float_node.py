"""One node at a time, in float, by ONNX Runtime: the float islands of a quantized graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from edgepipe.onnx_session import known_opset
from edgepipe.quantization.graph import Array


class FloatNodes:
    """Runs nodes alone; keeps a session per node."""

    def __init__(self) -> None:
        self._sessions: dict[ir.Node, Any] = {}

    def run(self, node: ir.Node, inputs: list[Array | None]) -> list[Any]:
        """Arrays for these inputs; None stands for an input or output that is left out."""
        if node not in self._sessions:
            self._sessions[node] = _session(node, inputs)
        # ascontiguousarray alone makes a vector of a scalar.
        feeds = {
            f"i{k}": np.ascontiguousarray(a).reshape(a.shape)
            for k, a in enumerate(inputs)
            if a is not None
        }
        found = iter(self._sessions[node].run(None, feeds))
        return [next(found) if output.name else None for output in node.outputs]


def _session(node: ir.Node, inputs: list[Array | None]) -> Any:
    import onnxruntime

    proto = ir.serde.serialize_node(node)
    infos = []
    for index, array in enumerate(inputs):
        if array is not None:
            proto.input[index] = f"i{index}"
            dtype = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            infos.append(onnx.helper.make_tensor_value_info(f"i{index}", dtype, None))
    outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in proto.output if name]
    graph = onnx.helper.make_graph([proto], "node", infos, outputs)
    opset = onnx.helper.make_opsetid("", known_opset([node.op_type]))
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=11)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
