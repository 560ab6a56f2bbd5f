"""Bring a model into the form all other passes expect.

1. Model-local functions are inlined; none remain.
2. Constant nodes become initializers, those of subgraphs move to the main graph.
3. Initializers that are also listed as inputs (IR version 3) stop being inputs.
4. Metadata and doc strings are dropped, nodes sorted topologically, names made unique.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from edgepipe.errors import UserError
from edgepipe.passes.editor import Editor


def run(edit: Editor) -> int:
    """Apply the cases above to the whole model."""
    model = edit.model
    changed = 0
    if model.functions:
        try:
            changed += bool(common.InlinePass()(model).modified)
        except (ir.passes.PassError, ir.passes.InvariantError, ValueError) as error:
            cause = error.__cause__ or error
            raise UserError(f"model-local functions cannot be inlined: {cause}") from None
    for step in (
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveInitializersFromInputsPass(),
        common.TopologicalSortPass(),
        common.NameFixPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        changed += bool(step(model).modified)
    edit.refresh()
    return changed
