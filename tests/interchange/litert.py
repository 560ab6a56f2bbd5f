"""Runs .tflite files in LiteRT, and takes them apart."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from quantization.networks import Array, context, samples

from edgepipe import quantization
from edgepipe.interchange import tflite
from edgepipe.quantization import QuantConfig


def quantize(model: ir.Model, recipe: str = "w8a8", **changes: object) -> ir.Model:
    """As tflite wants it, scales by minimum and maximum."""
    options = {"methods": (), "observer": "minmax"} | changes
    config = tflite.config(QuantConfig.parse(recipe, **options))
    return quantization.apply(model, config, samples(model), context())


class Program:
    """A file in the interpreter. ``delegate`` False leaves XNNPACK out."""

    def __init__(self, data: bytes, delegate: bool = True) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        kind = OpResolverType.AUTO if delegate else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self.interpreter = Interpreter(
            model_content=data, num_threads=1, experimental_op_resolver_type=kind
        )
        self.interpreter.allocate_tensors()

    def run(self, feeds: dict[str, Array]) -> list[Array]:
        """Inputs and outputs with the axes of the ONNX model."""
        for detail in self.interpreter.get_input_details():
            x = feeds[detail["name"]]
            turned = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x
            self.interpreter.set_tensor(detail["index"], np.ascontiguousarray(turned))
        self.interpreter.invoke()
        found = [
            self.interpreter.get_tensor(d["index"]) for d in self.interpreter.get_output_details()
        ]
        return [y.transpose(0, 3, 1, 2) if y.ndim == 4 else y for y in found]

    @property
    def kinds(self) -> list[str]:
        """Operators in order, those of delegates left out."""
        return [d["op_name"] for d in self.operators]

    @property
    def operators(self) -> list[dict[str, object]]:
        found = self.interpreter._get_ops_details()
        return [d for d in found if d["op_name"] != "DELEGATE"]

    def wholly_delegated(self) -> bool:
        """Whether XNNPACK took every operator, from the inputs to the outputs."""
        parts = [d for d in self.interpreter._get_ops_details() if d["op_name"] == "DELEGATE"]
        ends = {d["index"] for d in self.interpreter.get_output_details()}
        starts = {d["index"] for d in self.interpreter.get_input_details()}
        return (
            len(parts) == 1 and starts <= {*parts[0]["inputs"]} and ends <= {*parts[0]["outputs"]}
        )

    def float_between_integers(self) -> list[str]:
        """Operators that compute in float on the way to a QUANTIZE or an int8 operator.

        Sound only if nothing but the inputs of the model feeds a QUANTIZE with floats.
        """
        types = {d["index"]: d["dtype"] for d in self.interpreter.get_tensor_details()}
        writer = {int(i): d for d in self.operators for i in d["outputs"]}
        wrong = []
        for operator in self.operators:
            writes_codes = any(types[int(i)] is np.int8 for i in operator["outputs"])
            for index in operator["inputs"]:
                if writes_codes and types.get(int(index)) is np.float32 and int(index) in writer:
                    wrong.append(f"{operator['op_name']} reads {writer[int(index)]['op_name']}")
        return wrong


def output_scale(model: ir.Model) -> float:
    """The scale of the last rounding in front of the first output."""
    node = model.graph.outputs[0].producer()
    while node is not None and node.op_type != "DequantizeLinear":
        node = node.inputs[0].producer()
    assert node is not None
    return float(node.inputs[1].const_value.numpy())
