"""Refuses constants that are no numbers. It runs last and changes nothing.

1. NaN in any constant: all that reads it is undefined, and max(NaN, 0) differs between machines.
2. Infinities in weights of linear operators, where zeros of the input make NaN of them. Elsewhere
   they have their uses (masks of attention).
"""

from __future__ import annotations

import numpy as np

from edgepipe.errors import UserError
from edgepipe.passes.editor import Array, Editor, array_of, is_op


def run(edit: Editor) -> int:
    """Raises UserError naming the first such constant."""
    for node in edit.model.graph.all_nodes():
        linear = is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul")
        for index, value in enumerate(node.inputs):
            array = array_of(value)
            if array is None or array.dtype.kind != "f" or _sums_up(array):
                continue
            bad = ~np.isfinite(array) if linear and index < 2 else np.isnan(array)
            if bad.any():
                assert value is not None
                raise UserError(
                    f"constant '{value.name}' is not finite: "
                    f"{np.count_nonzero(np.isnan(array))} of {array.size} values are NaN, "
                    f"{np.count_nonzero(np.isinf(array))} infinite",
                    where=f"{node.op_type} '{node.name}'",
                    fix="repair or train the model and export it again",
                )
    return 0


def _sums_up(array: Array) -> bool:
    """Whether there is neither NaN nor infinity; needs no memory beside ``array``."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum(dtype=np.float64)))
