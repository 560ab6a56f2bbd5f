"""Which layers of codes run over the blocks of their weights that are not zero."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edgepipe.codegen.plan import SparseAudit
from edgepipe.context import Context
from edgepipe.kernels import qsparse, qsparse_cost, qsparse_gemv
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.quantization.graph import Array

STAGE = "lowering.sparsity"
#: Weights with fewer zeros than this are dense.
LEAST_ZEROS = 0.2


def choose(
    op: QConvOp, codes: Array, name: str, context: Context
) -> tuple[QConvOp, SparseAudit | None]:
    """``op`` in the form with the lower estimate, and what the manifest says about it; None for
    weights ``codes[co, ci/g, kh, kw]`` that are dense."""
    zeros = 1 - float(np.count_nonzero(codes)) / max(codes.size, 1)
    if zeros < LEAST_ZEROS or op.depthwise:
        return op, None
    if context.target.kind == "cuda":
        context.note(STAGE, name, f"{100 * zeros:.0f} % zeros: kernels of GPUs are dense")
        return op, None
    count = qsparse_gemv.blocks if qsparse.one_pixel(op) else qsparse.blocks
    sparse = replace(op, stored=count(codes)) if zeros < 1 else op
    reason = qsparse.unfit(sparse, context.target) if sparse.stored else "all weights are zero"
    estimates = {"dense": qsparse_cost.dense(op, context.target)}
    if reason is None:
        estimates["blocks"] = qsparse_cost.blocks(sparse, context.target)
    form = min(estimates, key=lambda f: estimates[f])
    told = ", ".join(f"{kind} {count:,}" for kind, count in estimates.items())
    text = f"{100 * zeros:.0f} % zeros: {form} kernel; estimated instructions: {told}"
    context.note(STAGE, name, text if reason is None else f"{text}; no blocks: {reason}")
    stored = None if form == "dense" else sparse.stored * qsparse.BLOCK
    audit = SparseAudit(round(zeros, 4), form, stored, estimates)
    return (op if form == "dense" else sparse), audit
