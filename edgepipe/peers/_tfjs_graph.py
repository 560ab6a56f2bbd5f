"""An ONNX model as a list of TensorFlow.js calls, as TensorFlow's converter would leave it.

Tensors with four axes are channels last from the first convolution on; batch norms are folded and
activations part of the products before them. TensorFlow itself is not needed.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from edgepipe.errors import UserError
from edgepipe.peers import _tfjs_operators

_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


def graph_file(model: bytes) -> bytes:
    """``model`` for tfjs.mjs: the length of a JSON document in 4 bytes, the document, and float32
    constants, 4-byte aligned. Inputs and outputs with four axes are channels last. Raises UserError
    naming the operator that has no counterpart."""
    graph = TfjsGraph(_folded(model))
    for node in graph.nodes:
        if node.output[0] not in graph.done:
            _tfjs_operators.append(graph, node)
    return graph.to_bytes()


def _folded(model: bytes) -> Any:
    """With constants and batch norms folded by ONNX Runtime, operators still those of ONNX, and
    every shape."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 4
    with tempfile.TemporaryDirectory(prefix="edgepipe-peer-") as folder:
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        proto = onnx.load(options.optimized_model_filepath)
    return onnx.shape_inference.infer_shapes(proto, data_prop=True).graph


class TfjsGraph:
    """The calls so far. ``last`` names what is held channels last, ``done`` what was computed
    as part of another call."""

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self.nodes = list(graph.node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.inputs = [i.name for i in graph.input if i.name not in self.constants]
        self.outputs = [o.name for o in graph.output]
        self.shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
                       for v in (*graph.input, *graph.value_info, *graph.output)}  # fmt: skip
        self.shapes |= {name: value.shape for name, value in self.constants.items()}
        self.last = {name for name in self.inputs if len(self.shapes[name]) == 4}
        self.done: set[str] = set()
        self.steps: list[dict[str, Any]] = []
        self._stored: dict[str, np.ndarray[Any, Any]] = {}
        uses = Counter(name for node in self.nodes for name in node.input)
        uses.update(self.outputs)
        self._sole = {name: node for node in self.nodes for name in node.input if uses[name] == 1}

    def call(self, op: str, inputs: list[str], output: str, **options: Any) -> None:
        """Append a call."""
        self.steps.append({"op": op, "inputs": inputs, "output": output, **options})

    def constant(self, name: str, value: Any) -> str:
        """Store a float32 constant as ``name``."""
        self._stored[name] = np.ascontiguousarray(value, np.float32)
        return name

    def sole_consumer(self, name: str) -> Any:
        """The node that alone reads ``name``; None where there are others."""
        return self._sole.get(name)

    def channels_last(self, name: str) -> str:
        """``name``, with four axes, channels last."""
        if name in self.last:
            return name
        if name in self.constants:
            return self.constant(f"{name}:last", self.constants[name].transpose(_TO_LAST))
        return self._turned(name, f"{name}:last", _TO_LAST)

    def as_stated(self, name: str) -> str:
        """``name`` with its axes as the model has them."""
        if name in self.constants:
            return self.constant(name, self.constants[name])
        return self._turned(name, f"{name}:first", _TO_FIRST) if name in self.last else name

    def _turned(self, name: str, turned: str, axes: tuple[int, ...]) -> str:
        if turned in self.shapes:
            return turned
        n, c, h, w = self.shapes[name]
        self.shapes[turned] = (n, h, w, c) if axes == _TO_LAST else (n, c, h, w)
        if h * w == 1 or c == 1:
            self.call("reshape", [name], turned, shape=self.shapes[turned])
        else:
            self.call("transpose", [name], turned, axes=axes)
        return turned

    def to_bytes(self) -> bytes:
        """The file; each call also says which tensors nobody reads after it."""
        outputs = [self.channels_last(name) if len(self.shapes[name]) == 4 else name
                   for name in self.outputs]  # fmt: skip
        unread = set(outputs) | set(self.inputs) | set(self._stored)
        for step in reversed(self.steps):
            step["free"] = sorted(set(step["inputs"]) - unread)
            unread.update(step["inputs"])
        offset, constants = 0, {}
        for name, value in self._stored.items():
            constants[name] = {"shape": value.shape, "offset": offset}
            offset += value.nbytes
        document = json.dumps({"inputs": self.inputs, "outputs": outputs, "steps": self.steps,
                               "constants": constants}).encode()  # fmt: skip
        document += b" " * (-len(document) % 4)
        head = len(document).to_bytes(4, "little")
        return b"".join([head, document, *(value.tobytes() for value in self._stored.values())])


def refusal(node: Any, why: str = "") -> UserError:
    """That ``node`` has no counterpart."""
    name = f" '{node.name}'" if node.name else ""
    return UserError(f"{node.op_type}{name}{' ' + why if why else ''} has no counterpart",
                     where="--against tfjs")  # fmt: skip
