"""The integer interpreter as a reference: what the kernels must compute, bit for bit.

ONNX Runtime reads a Q/DQ model in its own two ways, which round a few ties differently. Deep
networks amplify that until even those two are steps apart at the outputs; there the definition
itself decides.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgepipe.data import Inputs


def integer_run(model: bytes) -> Callable[[Inputs], Inputs]:
    """A function that runs a canonical Q/DQ model in integers; slow, for a few runs."""
    import onnx
    import onnx_ir as ir

    from edgepipe.quantization.interpreter import Interpreter

    graph = ir.serde.deserialize_model(onnx.load_model_from_string(model))
    interpreter = Interpreter(graph)

    def run(inputs: Inputs) -> Inputs:
        found = interpreter.run(inputs)
        return {
            str(value.name): np.asarray(found[str(value.name)], value.dtype.numpy())
            if value.dtype is not None
            else found[str(value.name)]
            for value in graph.graph.outputs
        }

    return run
