"""What the default schedule needs to know of a block of a PrimFunc."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import TensorLoad, Var
from tvm_ffi import structural_walk

_SPATIAL, _REDUCED = 0, 2


@dataclass(frozen=True)
class Block:
    """One block: its iteration axes in order, the buffers it touches, and what it computes.

    ``kinds`` has "S" or "R" per axis, ``extents`` their lengths. ``opaque`` blocks have other
    axes, several statements or several outputs, and are left alone. ``guarded`` says that a load
    is behind a condition.
    """

    handle: Any
    name: str
    kinds: tuple[str, ...]
    extents: tuple[int, ...]
    reads: tuple[Any, ...]
    writes: Any
    node: Any
    opaque: bool
    guarded: bool
    writes_output: bool

    @property
    def reduction(self) -> bool:
        """Whether an axis is reduced."""
        return "R" in self.kinds

    @property
    def iterations(self) -> int:
        """How often the block runs."""
        total = 1
        for extent in self.extents:
            total *= extent
        return total


def read_blocks(sch: Any) -> list[Block]:
    """Blocks below the root of ``main`` in execution order; empty when there is no such form."""
    function = sch.mod["main"]
    root = sch.get_sblock("root")
    outputs = list(function.params)
    return [_read(sch, handle, outputs) for handle in sch.get_child_blocks(root)]


def _read(sch: Any, handle: Any, outputs: list[Any]) -> Block:
    node = sch.get(handle)
    types = [int(v.iter_type) for v in node.iter_vars]
    single = len(node.writes) == 1 and isinstance(node.body, tirx.BufferStore)
    plain = all(t in (_SPATIAL, _REDUCED) for t in types)
    written = node.writes[0].source if node.writes else None
    return Block(
        handle=handle,
        name=node.name_hint,
        kinds=tuple("S" if t == _SPATIAL else "R" for t in types),
        extents=tuple(int(v.dom.extent) for v in node.iter_vars),
        reads=tuple(r.source for r in node.reads),
        writes=written,
        node=node,
        opaque=not (single and plain),
        guarded=_contains_branch(node.body),
        writes_output=any(written is not None and written.same_as(o) for o in outputs),
    )


def _contains_branch(body: Any) -> bool:
    found: list[bool] = []

    def visit(node: Any) -> None:
        if _op_name(node) == "prim.if_then_else":
            found.append(True)

    structural_walk(body, visit)
    return bool(found)


def _op_name(node: Any) -> str:
    op = getattr(node, "op", None)
    return str(getattr(op, "name", ""))


def cost(node: Any) -> int:
    """How much work computing one element is: operations, a call or a division counting 8."""
    total = [0]

    def visit(part: Any) -> None:
        if isinstance(part, tirx.Add | tirx.Sub | tirx.Mul | tirx.Max | tirx.Min | tirx.Select):
            total[0] += 0 if _is_index(part) else 1
        elif isinstance(part, tirx.Div) or _op_name(part) not in ("", "prim.if_then_else"):
            total[0] += 0 if _is_index(part) else 8

    structural_walk(node.body, visit)
    return total[0]


def _is_index(expression: Any) -> bool:
    return str(expression.ty.dtype) in ("int32", "int64")


def fusible(block: Block, axis: int) -> bool:
    """Whether spatial axes ``axis`` and ``axis + 1`` walk every buffer contiguously together."""
    first, second = (block.node.iter_vars[a].var for a in (axis, axis + 1))
    extent = block.extents[axis + 1]
    fine = [True]

    def check(buffer: Any, indices: Any) -> None:
        uses = [(_uses(i, first), _uses(i, second)) for i in indices]
        if not any(a or b for a, b in uses):
            return
        for position, index in enumerate(indices):
            if not any(uses[position]):
                continue
            pair_start = (
                index.same_as(first)
                and position + 1 < len(indices)
                and indices[position + 1].same_as(second)
                and int(buffer.shape[position + 1]) == extent
            )
            pair_end = (
                index.same_as(second) and position > 0 and indices[position - 1].same_as(first)
            )
            if not (pair_start or pair_end):
                fine[0] = False

    def visit(node: Any) -> None:
        if isinstance(node, TensorLoad | tirx.BufferStore):
            check(_accessed(node), list(node.indices))

    structural_walk(block.node.body, visit)
    return fine[0]


#: Calls that exist for vectors on every target. The first four only in float32.
_POLYNOMIALS = frozenset(f"tirx.{n}" for n in ("exp", "tanh", "erf", "sigmoid"))
_VECTOR_CALLS = frozenset(
    {
        *("prim.if_then_else", "prim.likely", "tirx.sqrt", "tirx.fabs", "tirx.floor", "tirx.ceil"),
        *("tirx.trunc", "tirx.nearbyint", "tirx.reinterpret", "tirx.shift_left"),
        *("tirx.shift_right", "tirx.bitwise_and", "tirx.bitwise_or", "tirx.bitwise_xor"),
    }
)


def vectorizable(block: Block) -> bool:
    """Whether every operation of the block has a vector form.

    Bool buffers have none (LLVM would pack them to bits), nor have calls of C functions. LLVM's
    WebAssembly backend does not terminate on vectors of half.
    """
    fine = [True]

    def visit(node: Any) -> None:
        name = _op_name(node)
        if isinstance(node, TensorLoad | tirx.BufferStore):
            fine[0] &= str(_accessed(node).dtype) not in ("bool", "float16")
        elif name in _POLYNOMIALS:
            fine[0] &= str(node.ty.dtype) == "float32"
        elif name and name not in _VECTOR_CALLS:
            fine[0] = False

    structural_walk(block.node.body, visit)
    return fine[0]


def contiguous(block: Block) -> bool:
    """Whether vectors along the last axis are plain loads and stores or broadcasts."""
    last = block.node.iter_vars[-1].var
    fine = [not block.guarded]

    def visit(node: Any) -> None:
        if not isinstance(node, TensorLoad | tirx.BufferStore):
            return
        indices = list(node.indices)
        for position, index in enumerate(indices):
            if _uses(index, last) and not (index.same_as(last) and position == len(indices) - 1):
                fine[0] = False

    structural_walk(block.node.body, visit)
    return fine[0]


def _accessed(node: Any) -> Any:
    """The buffer of a load or store."""
    return node.buffer if isinstance(node, tirx.BufferStore) else node.source


def _uses(expression: Any, var: Any) -> bool:
    found: list[bool] = []

    def visit(node: Any) -> None:
        if isinstance(node, Var) and node.same_as(var):
            found.append(True)

    structural_walk(expression, visit)
    return bool(found)
