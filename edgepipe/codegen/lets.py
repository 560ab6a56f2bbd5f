"""Long chains of ``let`` expressions as statements.

TVM's code generators simplify the value of every ``let`` anew, with all that it is made of: one
that is made of another takes about three times as long as that. A function such as a sigmoid is a
chain of several, and elementwise operators in a row make one chain. Where that gets long, what is
bound is held in a register instead, which the simplifier does not look behind.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import ir, tirx

#: Length of a chain of ``let`` that is left alone; twelve take a second.
LENGTH = 8


def flatten(module: Any) -> Any:
    """``module``, an IRModule of lowered PrimFuncs, with registers for every ``let`` of those in
    which a chain of them is longer than LENGTH."""
    return tvm.IRModule({var: _flat(func) for var, func in module.functions.items()})


def _flat(func: Any) -> Any:
    flattening = _Flattening()
    body = flattening.run(func.body)
    return func if flattening.longest <= LENGTH else func.with_body(body)


class _Flattening:
    def __init__(self) -> None:
        #: How long the chain is that ends with each variable, with the longest of what has been
        #: visited of the current value, and of all.
        self.lengths: dict[Any, int] = {}
        self.reach = self.longest = 0
        #: Statements to precede the one being visited; None where nothing may be moved there.
        self.before: list[Any] | None = None

    def run(self, body: Any) -> Any:
        return tvm_ffi.structural_mutate(
            body,
            [
                ((tirx.BufferStore, tirx.Evaluate), self.statement),
                (tirx.Bind, self.bind),
                (tirx.Let, self.let),
                (ir.Call, self.call),
                (tirx.Var, self.var),
            ],
        )

    def statement(self, statement: Any, mutator: Any) -> Any:
        self.before = []
        changed = mutator.default_mutate(statement)
        before, self.before = self.before, None
        return tirx.SeqStmt([*before, changed]) if before else changed

    def bind(self, bind: Any, mutator: Any) -> Any:
        """What common subexpressions of several statements have become."""
        if not str(bind.var.ty.dtype).startswith("float"):
            return self.statement(bind, mutator)
        self.before = []
        self.hold(bind, mutator)
        before, self.before = self.before, None
        return tirx.SeqStmt(before)

    def let(self, let: Any, mutator: Any) -> Any:
        if self.before is None:
            return mutator.default_mutate(let)
        self.hold(let, mutator)
        return mutator.mutate(let.body)

    def hold(self, bound: Any, mutator: Any) -> None:
        """A register for the variable of a ``let`` or a binding."""
        reach, self.reach = self.reach, 0
        value = mutator.mutate(bound.value)
        length = self.lengths[bound.var] = self.reach + 1
        self.longest, self.reach = max(self.longest, length), reach
        dtype, _, lanes = str(value.ty.dtype).partition("x")
        buffer = tirx.decl_buffer((int(lanes or 1),), dtype, bound.var.name, scope="local")
        place = [tirx.Ramp(0, 1, int(lanes)) if lanes else tirx.const(0, "int32")]
        assert self.before is not None
        self.before += [tirx.AllocBuffer(buffer), tirx.BufferStore(buffer, value, place)]
        mutator.var_remap_set(bound.var, tirx.BufferLoad(buffer, place))

    def call(self, call: Any, mutator: Any) -> Any:
        """Branches of a condition may read what must not be read otherwise: they stay."""
        if not call.op.same_as(ir.Op.get("prim.if_then_else")):
            return mutator.default_mutate(call)
        before, self.before = self.before, None
        changed = mutator.default_mutate(call)
        self.before = before
        return changed

    def var(self, var: Any, mutator: Any) -> Any:
        self.reach = max(self.reach, self.lengths.get(var, 0))
        return mutator.default_mutate(var)
