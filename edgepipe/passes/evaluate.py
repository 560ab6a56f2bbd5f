"""Compute one node on constants, with the ONNX reference evaluator."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator

from edgepipe.passes.editor import OPSET, Array

#: Operators whose result is not a function of their inputs.
RANDOM = frozenset(
    [
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
        "Multinomial",
        "Bernoulli",
    ]
)


def evaluate(node: ir.Node, inputs: dict[str, Array], opset: int = OPSET) -> list[Array] | None:
    """Outputs of ``node`` as arrays, or None where the reference cannot compute it as tensors.

    ``inputs`` maps the names of the node's inputs to arrays; they are not changed.
    """
    function = onnx.FunctionProto(
        name="node",
        domain="edgepipe",
        input=list(inputs),
        output=[v.name for v in node.outputs if v.name],
        node=[ir.serde.serialize_node(node)],
        opset_import=[helper.make_opsetid("", opset)],
    )
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            results = ReferenceEvaluator(function).run(None, dict(inputs), attributes={})
        except Exception:
            return None
    if not all(isinstance(result, np.ndarray | np.generic) for result in results):
        return None
    return [np.asarray(result) for result in results]
