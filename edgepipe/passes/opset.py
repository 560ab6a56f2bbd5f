"""Bring every node to the canonical opset; first sweep of folding and shape inference.

1. Operators of opset 6 and newer are rewritten to their form in ``editor.OPSET`` (``upgrade``).
2. Operators of later opsets that mean the same in ``OPSET`` are kept; others are decomposed
   (``decompose``) or refused by name.
3. On the way constants are folded and shapes inferred (``fold``), because old forms such as
   Softmax before opset 13 need the shapes.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from edgepipe.errors import Unsupported
from edgepipe.passes import fold, upgrade
from edgepipe.passes.editor import OPSET, Editor

_OLDEST = 6
_IR_VERSION = 10


def run(edit: Editor) -> int:
    """Upgrade the whole model; returns the number of nodes folded on the way."""
    model = edit.model
    opset = model.opset_imports.pop("ai.onnx", None) or model.opset_imports.get("", OPSET)
    newest = onnx.defs.onnx_opset_version()
    if not _OLDEST <= opset <= newest:
        raise Unsupported(
            f"opset {opset} is not supported",
            where="model",
            fix=f"export with opset {_OLDEST} to {OPSET}",
        )
    for node in edit.nodes():
        if node.domain == "ai.onnx":
            node.domain = ""
        _check_known(node, opset)
    edit.before_visit = lambda node: upgrade.apply(edit, node, opset)
    try:
        count = fold.sweep(edit, model.graph)
    finally:
        edit.before_visit = None
    upgrade.label(model)
    # Older forms of the file format list initializers as inputs and lack newer element types.
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return count


def _check_known(node: ir.Node, opset: int) -> None:
    where = f"node '{node.name}'"
    if node.domain != "":
        raise Unsupported(
            f"operator {node.domain}.{node.op_type} is not part of standard ONNX",
            where=where,
            fix="export with standard operators or provide it as a model-local function",
        )
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        raise Unsupported(
            f"operator {node.op_type} does not exist in opset {opset}", where=where
        ) from None
    if schema.deprecated and node.op_type not in upgrade.ADAPTERS:
        raise Unsupported(f"operator {node.op_type} is deprecated in opset {opset}", where=where)
