"""Whether integers are expected to pay: what convolutions cost in them and would in float32.

Both are counts of vector instructions from the register tiles (``kernels.sparse_cost`` and
``kernels.qsparse_cost``): an estimate, and no latency. Depthwise convolutions and what is not a
convolution have no such count and are left out; so are GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable

from edgepipe.codegen.plan import KernelAudit
from edgepipe.context import Context
from edgepipe.kernels import qsparse_cost, sparse_cost
from edgepipe.kernels.integer_ops import QConvOp
from edgepipe.kernels.layout import Blocked
from edgepipe.kernels.ops import ConvOp, Op
from edgepipe.target import Target

STAGE = "lowering.pace"
#: Estimates that are nearer to one another say nothing.
MARGIN = 1.05


def estimates(op: Op, target: Target) -> dict[str, int] | None:
    """Vector instructions of a convolution over codes as it is, and of the same one in float32."""
    if not isinstance(op, QConvOp) or op.depthwise or target.kind == "cuda":
        return None
    cost = qsparse_cost.blocks if op.stored else qsparse_cost.dense
    return {
        "integer": cost(op, target),
        "float32": op.groups * sparse_cost.dense(_in_float(op, target), target),
    }


def _in_float(op: QConvOp, target: Target) -> ConvOp:
    """The float convolution of one group of ``op``."""
    lanes = target.simd.lanes_f32
    inputs, outputs = op.x.c // op.groups, op.y.c // op.groups
    x = Blocked(op.x.n, inputs, op.x.h, op.x.w, lanes if inputs >= lanes else 1)
    y = Blocked(op.y.n, outputs, op.y.h, op.y.w, lanes)
    return ConvOp(x, y, op.kernel, op.strides, op.dilations, op.offset)


def judge(audits: Iterable[KernelAudit], context: Context) -> None:
    """Warn where the recipe's integers, or its zeros, are not expected to make anything faster."""
    audits = list(audits)
    counted = [a.estimated_instructions for a in audits if a.estimated_instructions]
    integer, floats = (sum(c[form] for c in counted) for form in ("integer", "float32"))
    if integer > MARGIN * floats:
        context.warn(
            STAGE,
            context.target.name,
            f"slower than float32 by estimate: convolutions take {integer / floats:.2f} times the "
            "vector instructions in integers; compile fp32 too and measure both "
            "(edgepipe compare)",
        )
    forms = [a.sparsity.form for a in audits if a.sparsity]
    if context.recipe.sparsity is not None and forms and set(forms) == {"dense"}:
        context.warn(
            STAGE,
            f"recipe {context.recipe}",
            f"no faster than {context.recipe.format} by estimate: all {len(forms)} layers with "
            "zeros run in dense kernels, which compute them; more zeros or another pattern may "
            "pay (docs/sparsity.md)",
        )
