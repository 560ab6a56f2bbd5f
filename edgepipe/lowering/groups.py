"""Which nodes run as kernel templates, and which of their neighbours fuse into them.

A *group* is an anchor (convolution, pooling, matrix product, ...) with the elementwise nodes that
follow it. Groups over images are computed in the blocked layout; the walk in ``find`` marks, in
topological order, the values that live in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.kernels.epilogue import Step
from edgepipe.lowering import anchors
from edgepipe.lowering.elementwise import binary_step, constant, unary_step
from edgepipe.lowering.integers import geometry, kernels

STAGE = "lowering.fuse"


@dataclass(eq=False)
class Group:
    """One kernel to be: its nodes in order, the anchor's kind, and the fused steps."""

    kind: str
    nodes: list[ir.Node]
    inputs: list[ir.Value]
    output: ir.Value
    blocked: bool
    steps: list[Step] = field(default_factory=list)
    operands: list[ir.Value] = field(default_factory=list)

    @property
    def anchor(self) -> ir.Node:
        return self.nodes[0]

    @property
    def label(self) -> str:
        return self.nodes[0].name or self.nodes[0].op_type


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Static shape of a value; every value has one by now."""
    assert value.shape is not None, value.name
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def nchw(shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """``[n, c, w]`` and ``[n, c, h, w]`` as four dimensions; None for other ranks."""
    if len(shape) == 3:
        return shape[0], shape[1], 1, shape[2]
    return shape if len(shape) == 4 else None


def is_float(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.FLOAT


#: Operators of whose inputs only the shape counts.
_OF_SHAPES = frozenset({"EyeLike", "Shape", "Size"})


def find(graph: ir.Graph, context: Context) -> list[Group]:
    """Return the groups of ``graph`` in the order of their last nodes."""
    finder = _Finder(graph, context)
    for node in graph:
        finder.visit(node)
    return finder.groups()


class _Finder:
    def __init__(self, graph: ir.Graph, context: Context) -> None:
        self.context = context
        self.outputs = set(graph.outputs)
        self.by_output: dict[ir.Value, Group] = {}
        self.gates = _self_gates(graph)
        self.gating = set(self.gates.values())
        self.order = {node: i for i, node in enumerate(graph)}
        #: Values that depend on constants and static shapes alone: TVM computes them as it lowers,
        #: which it cannot for a kernel of ours, over flat buffers.
        self.known: set[ir.Value] = set()

    def groups(self) -> list[Group]:
        return sorted(self.by_output.values(), key=lambda g: self.order[g.nodes[-1]])

    def blocked(self, value: ir.Value | None) -> bool:
        return value in self.by_output and self.by_output[value].blocked

    def visit(self, node: ir.Node) -> None:
        if self._is_known(node):
            self.known.update(node.outputs)
            return
        if kernels.handles(node):
            self._integer(node)
            return
        if node.domain not in ("", "ai.onnx") or node in self.gating:
            return
        if len(node.outputs) < 1 or not all(is_float(v) for v in node.outputs[:1]):
            return
        if self._fold_elementwise(node):
            return
        for kind, anchor in anchors.ANCHORS.items():
            reason = anchor(node, self.blocked, self.context.target)
            if reason is None:
                self._start(kind, node)
                return
            if reason:
                self.context.note(STAGE, node.name, f"{node.op_type} is not a {kind}: {reason}")

    def _is_known(self, node: ir.Node) -> bool:
        if node.domain in ("", "ai.onnx") and node.op_type in _OF_SHAPES:
            return True
        inputs = [v for v in node.inputs if v is not None]
        return bool(inputs) and all(v in self.known or constant(v) is not None for v in inputs)

    def _start(self, kind: str, node: ir.Node) -> None:
        inputs = [v for v in node.inputs if v is not None and constant(v) is None]
        output = node.outputs[0]
        self.by_output[output] = Group(kind, [node], inputs, output, kind not in anchors.PLAIN)

    def _integer(self, node: ir.Node) -> None:
        """A node over codes: a group of its own, its neighbours are fused already."""
        reason = kernels.refuse(node, self.context.target)
        if reason is not None:
            self.context.note(
                STAGE, node.name, f"{node.op_type} runs in the general form: {reason}"
            )
            return
        blocked = geometry.view_of(node) == geometry.IMAGE
        inputs, output = geometry.data(node), node.outputs[0]
        self.by_output[output] = Group("integer", [node], inputs, output, blocked)

    def _fold_elementwise(self, node: ir.Node) -> bool:
        """Append ``node`` to the group before it, or start an elementwise group."""
        sigmoid = self.gates.get(node)
        if sigmoid is not None:
            return self._append([sigmoid, node], sigmoid.inputs[0], Step("silu"), None)
        step = unary_step(node)
        if step is not None:
            return self._append([node], node.inputs[0], step, None)
        best: tuple[int, ir.Value, Step, ir.Value | None] | None = None
        for main in node.inputs:
            if main is None or main not in self.by_output:
                continue
            folded = binary_step(node, main)
            if folded is None or not self._operand_fits(main, folded[1], node):
                continue
            step, operand = folded
            group = self.by_output[main]
            rank = self.order[group.nodes[-1]]
            if self._open(main, [node]):  # fusing beats starting a group of its own
                rank += len(self.order)
            if best is None or rank > best[0]:
                best = (rank, main, step, operand)
        if best is None:
            return False
        return self._append([node], *best[1:])

    def _operand_fits(self, main: ir.Value, operand: ir.Value | None, node: ir.Node) -> bool:
        """Whether the result has the shape of ``main`` and the kernel can read ``operand``."""
        shape = shape_of(main)
        if shape_of(node.outputs[0]) != shape:
            return False
        if operand is None:
            return True
        if not is_float(operand):
            return False
        other = shape_of(operand)
        if self.by_output[main].blocked:
            if other == shape:
                return True
            n, c, *pixels = (1,) * (len(shape) - len(other)) + other
            return c == shape[1] and n in (1, shape[0]) and all(p == 1 for p in pixels)
        return other == shape or other == shape[-1:]

    def _open(self, main: ir.Value, nodes: list[ir.Node]) -> bool:
        """Whether nobody but ``nodes`` reads ``main``, so that it need not be stored."""
        users = {use.node for use in main.uses()}
        return users <= set(nodes) and main not in self.outputs

    def _append(
        self, nodes: list[ir.Node], main: ir.Value | None, step: Step, operand: ir.Value | None
    ) -> bool:
        if main is None or main not in self.by_output:
            return False
        group = self.by_output[main]
        output = nodes[-1].outputs[0]
        operands = [operand] if operand is not None else []
        if self._open(main, nodes) and group.kind not in anchors.NO_EPILOGUE:
            del self.by_output[main]
            group.nodes += nodes
            group.steps.append(step)
            group.operands += operands
            group.output = output
            self.by_output[output] = group
            return True
        if not group.blocked:
            return False
        self.context.note(
            STAGE,
            nodes[-1].name,
            f"{nodes[-1].op_type} is a kernel of its own: {main.name} has other readers",
        )
        self.by_output[output] = Group("map", nodes, [main], output, True, [step], operands)
        return True


def _self_gates(graph: ir.Graph) -> dict[ir.Node, ir.Node]:
    """SiLU as ONNX writes it: Mul nodes with the Sigmoid that only gates their other input."""
    gates = {}
    outputs = set(graph.outputs)
    for node in graph:
        if node.op_type != "Sigmoid" or node.outputs[0] in outputs:
            continue
        readers = [use.node for use in node.outputs[0].uses()]
        pair = {node.outputs[0], node.inputs[0]}
        if len(readers) == 1 and readers[0].op_type == "Mul" and set(readers[0].inputs) == pair:
            gates[readers[0]] = node
    return gates
