"""From a Q/DQ graph to one that computes in integers, for kernels that do.

``fold`` reads the graph as the integer interpreter does (``read``), and writes a node of DOMAIN
wherever something is rounded, or leaves the integers as float32: a convolution with its bias,
residual, activation and requantisation is one node. Codes keep one type throughout, the one that
the target's instructions want; operators that only move values run on codes. What has no integer
form stays as it was, on dequantised values: a float island.
"""

from __future__ import annotations

import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.lowering.integers import transposed
from edgepipe.lowering.integers.folder import Folder
from edgepipe.quantization.graph import is_op


def fold(model: ir.Model, context: Context) -> None:
    """Rewrite ``model`` in place; a graph without QuantizeLinear stays as it is.

    Raises UserError where a quantized product would compute in float, Unsupported where an int32
    accumulator could overflow.
    """
    if any(is_op(node, "QuantizeLinear") for node in model.graph):
        Folder(model.graph, context).run()
        transposed.split(model.graph)
