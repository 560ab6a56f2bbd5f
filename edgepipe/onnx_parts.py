"""A float ONNX model in two parts, so that its weights exist once however many read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx
    import onnxruntime

#: Where the graph says that a weight lies: nowhere, it is lent by name.
LOCATION = "apart"
#: Bytes. Tensors that decide shapes (axes, pads, sizes) are far smaller, weights mostly larger.
HEAVY = 4096


@dataclass(frozen=True, eq=False)
class OnnxParts:
    """``graph`` is a serialized ModelProto whose heavy initializers are external data; ``weights``
    has their arrays by name, not to be changed."""

    graph: bytes
    weights: Mapping[str, np.ndarray[Any, np.dtype[Any]]]

    @classmethod
    def of(cls, model: bytes | OnnxParts) -> OnnxParts:
        """``model`` itself, or a file as one."""
        return model if isinstance(model, OnnxParts) else cls(model, {})

    def session(
        self, options: onnxruntime.SessionOptions, providers: list[str]
    ) -> onnxruntime.InferenceSession:
        """An ONNX Runtime session that reads the weights where they are."""
        import onnxruntime

        lent = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self.weights.values()]
        if lent:
            options.add_external_initializers(list(self.weights), lent)
        session = onnxruntime.InferenceSession(self.graph, options, providers=providers)
        session.lent = lent  # it points there, and keeps nothing alive
        return session

    def proto(self) -> onnx.ModelProto:
        """The whole model as a message; a copy of the weights."""
        import onnx

        found = onnx.load_model_from_string(self.graph)
        for tensor in found.graph.initializer:
            if is_apart(tensor):
                tensor.ClearField("external_data")
                tensor.data_location = onnx.TensorProto.DEFAULT
                tensor.raw_data = self.weights[tensor.name].tobytes()
        return found

    def whole(self) -> bytes:
        """The whole model as a self-contained file, the same bytes for the same model."""
        if not self.weights:
            return self.graph
        content: bytes = self.proto().SerializeToString(deterministic=True)
        return content


def is_apart(tensor: onnx.TensorProto) -> bool:
    """Whether an initializer is one that ``put_apart`` made."""
    return any(e.key == "location" and e.value == LOCATION for e in tensor.external_data)


def put_apart(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """``tensor`` without its numbers."""
    import onnx

    light = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    light.data_location = onnx.TensorProto.EXTERNAL
    light.external_data.add(key="location", value=LOCATION)
    return light
