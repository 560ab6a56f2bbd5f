"""Which layers run over their nonzero weights alone, and in which form.

Weights tell: a convolution, or dense layer of one row, with zeros is described in every form that
the target has a kernel for, and the form with the lowest estimate is taken, dense included. Rows
work over planes, so they pay for the copies between planes and blocks of channels at the borders
of their region; a row form that does not, with them, beat what else there is, is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgepipe.codegen.plan import SparseAudit
from edgepipe.context import Context
from edgepipe.kernels import sparse_cost, sparse_shared
from edgepipe.kernels.layout import NO_PADS, Blocked
from edgepipe.kernels.ops import ConvOp, MatmulOp
from edgepipe.kernels.sparse import Sparse, gathered, rows, shared
from edgepipe.lowering.describe import four_dims, kernel_op, matmul_kernel
from edgepipe.lowering.elementwise import attribute, constant
from edgepipe.lowering.groups import Group
from edgepipe.lowering.weights import stored
from edgepipe.target import Target

STAGE = "lowering.sparsity"
#: Weights with fewer zeros than this are dense to every form.
LEAST_ZEROS = 0.2


@dataclass(frozen=True)
class Choice:
    """``form`` is None for the dense kernel; ``estimates`` has vector instructions by form."""

    form: Sparse | None
    zeros: float
    estimates: dict[str, int]
    others: tuple[Sparse, ...] = ()

    @property
    def planes(self) -> bool:
        """Whether the kernel reads and writes planes."""
        return self.form is not None and self.form.form == "rows"

    def audit(self) -> SparseAudit:
        """For the manifest."""
        form, stored = ("dense", None) if self.form is None else (self.form.form, self.form.weights)
        return SparseAudit(round(self.zeros, 4), form, stored, self.estimates)

    def without_rows(self) -> Choice:
        """The best of the other forms."""
        return self._best([f for f in self.others if f.form != "rows"])

    def _best(self, forms: list[Sparse]) -> Choice:
        best = min(forms, key=lambda f: self.estimates[f.form], default=None)
        if best is not None and self.estimates[best.form] >= self.estimates["dense"]:
            best = None
        return replace(self, form=best)

    @classmethod
    def best(cls, zeros: float, estimates: dict[str, int], forms: list[Sparse]) -> Choice:
        """The form with the lowest estimate."""
        return cls(None, zeros, estimates, tuple(forms))._best(forms)


def choose(groups: list[Group], context: Context) -> dict[Group, Choice]:
    """A choice for every group whose weights have enough zeros to be worth a look."""
    choices: dict[Group, Choice] = {}
    if context.target.kind == "cuda":
        if context.recipe.sparsity is not None:
            what = "pruned weights are computed like all others: there is no sparse GPU kernel"
            context.warn(STAGE, context.target.name, what)
        return choices
    for group in groups:
        choice = _look_at(group, context)
        if choice is not None:
            choices[group] = choice
    _take_back(groups, choices, context)
    for group, choice in choices.items():
        told = ", ".join(f"{name} {count:,}" for name, count in choice.estimates.items())
        form = "dense" if choice.form is None else choice.form.form
        context.note(
            STAGE,
            group.label,
            f"{100 * choice.zeros:.0f} % zeros: {form} kernel; estimated instructions: {told}",
        )
    return choices


def _look_at(group: Group, context: Context) -> Choice | None:
    node = group.anchor
    if group.kind not in ("conv", "matmul") or int(attribute(node, "group", 1)) != 1:
        return None
    if stored(node.inputs[1]) is not None or (group.kind == "matmul" and not one_row(group)):
        return None
    weight = constant(node.inputs[1])
    if weight is None:
        return None
    zeros = 1 - float(np.count_nonzero(weight)) / max(weight.size, 1)
    if zeros < LEAST_ZEROS or zeros == 1.0:
        return None
    found, forms = estimates(group, weight, context.target)
    return Choice.best(zeros, found, forms)


def one_row(group: Group) -> bool:
    """Whether a dense layer has one row of inputs and constant float32 weights."""
    op = matmul_kernel(group).op
    assert isinstance(op, MatmulOp)
    halves = {op.a_dtype, op.y_dtype, *op.residual_dtypes} != {"float32"}
    return op.constant and op.batch == op.m == 1 and op.weights.plain and not halves


def estimates(
    group: Group, weight: np.ndarray, target: Target
) -> tuple[dict[str, int], list[Sparse]]:
    """Vector instructions of a convolution, or of a dense layer of one row, by form, with the
    nonzeros of ``weight`` in ONNX's layout, "dense" among them; and the sparse forms."""
    if group.kind == "matmul":
        dense = matmul_kernel(group).op
        assert isinstance(dense, MatmulOp)
        form = gathered(matrix(group.anchor, weight))
        costs = {
            "dense": sparse_cost.dense_row(dense, target),
            "gathered": sparse_cost.gathered(dense, form, target),
        }
        return costs, [form]
    if weight.ndim == 3:
        weight = weight[:, :, None]
    lanes = target.simd.lanes_f32
    op = _as_op(group, lanes)
    found = {"dense": sparse_cost.dense(op, target)}
    candidates = [shared(weight, w) for w in sparse_shared.widths(target, op.y.c)]
    forms = [min(candidates, key=lambda f: sparse_cost.shared(op, f, target))]
    found["shared"] = sparse_cost.shared(op, forms[0], target)
    if op.strides == (1, 1):
        forms.append(rows(weight))
        found["rows"] = sparse_cost.rows(_as_op(group, 1), forms[1], target)
    return found, forms


def matrix(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """The weight of a Gemm or MatMul as ``[outputs, inputs]``."""
    transposed = node.op_type == "Gemm" and int(attribute(node, "transB", 0))
    return weight if transposed else weight.reshape(weight.shape[-2:]).T


def _as_op(group: Group, lanes: int) -> ConvOp:
    """The group's convolution between layouts without borders, for questions about its size."""
    source, result = group.inputs[0], group.output
    y = Blocked(*four_dims(result), lanes, NO_PADS)
    n, c, h, w = four_dims(source)
    op = kernel_op(group, [Blocked(n, c, h, w, lanes if c >= lanes else 1)], y, [])
    assert isinstance(op, ConvOp)
    return replace(op, epilogue=())


def in_planes(group: Group, planes: set[ir.Value], choices: dict[Group, Choice]) -> bool:
    """Whether ``group`` writes planes, given the values before it that are stored so."""
    choice = choices.get(group)
    if choice is not None and choice.planes:
        return True
    return group.inputs[0] in planes and is_depthwise(group)


def is_depthwise(group: Group) -> bool:
    """Whether the depthwise kernel over planes can do it."""
    node = group.anchor
    if group.kind != "conv" or stored(node.inputs[1]) is not None:
        return False
    channels, groups = four_dims(group.inputs[0])[1], int(attribute(node, "group", 1))
    strides = node.attributes.get("strides")
    across = 1 if strides is None else int(strides.value[-1])
    return groups == channels == four_dims(group.output)[1] > 1 and across <= 2


def region(groups: list[Group], choices: dict[Group, Choice]) -> set[ir.Value]:
    """The values that are stored as planes."""
    planes: set[ir.Value] = set()
    for group in groups:
        if in_planes(group, planes, choices):
            planes.add(group.output)
    return planes


def _take_back(groups: list[Group], choices: dict[Group, Choice], context: Context) -> None:
    """Rows that do not pay for the copies at their borders become what is next best."""
    lanes = context.target.simd.lanes_f32
    while True:
        planes = region(groups, choices)
        losses = {}
        for group, choice in choices.items():
            if not choice.planes:
                continue
            inner = [v in planes for v in (group.inputs[0], *group.operands)]
            readers = [g for g in groups if group.output in (*g.inputs, *g.operands)]
            leaves = not readers or any(g.output not in planes for g in readers)
            copies = [group.inputs[0]] * (not inner[0]) + [group.output] * leaves
            cost = sum(
                sparse_cost.relayout(Blocked(*four_dims(v), lanes), context.target) for v in copies
            )
            other = choice.without_rows()
            name = "dense" if other.form is None else other.form.form
            loss = choice.estimates["rows"] + cost - choice.estimates[name]
            if loss >= 0:
                losses[group] = loss
        if not losses:
            return
        worst = max(losses, key=lambda g: losses[g])
        choices[worst] = choices[worst].without_rows()
