"""Remove what computes nothing new.

1. Dead nodes and unused initializers.
2. Initializers with equal contents become one.
3. Nodes with the same operator, inputs and attributes become one.
"""

from __future__ import annotations

from onnx_ir.passes import common

from edgepipe.passes.editor import Editor


def run(edit: Editor) -> int:
    """Apply 1 to 3; returns the number of nodes and initializers removed."""
    before = _size(edit)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(size_limit=1 << 16),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        step(edit.model)
    return before - _size(edit)


def _size(edit: Editor) -> int:
    return sum(len(g) + len(g.initializers) for g in edit.model.graphs())
