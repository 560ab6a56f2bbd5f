"""Chooses the layout of every value and rewrites the groups as nodes of domain ``edgepipe``.

Values of blocked groups are stored ``NCHW{lanes}c``, codes NHWC, with the border that their
readers' padding asks for, so that convolutions read them as they are. A value that is needed in
another layout is copied once, by a relayout node; the manifest counts those.

Each new node carries ``meta["kernel"]``, a KernelNode: what the emitter needs besides the inputs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.kernels.integer_ops import MoveOp, QConvOp
from edgepipe.kernels.layout import NO_PADS, Blocked, Pads
from edgepipe.kernels.ops import ConvOp, MatmulOp, Op, RelayoutOp
from edgepipe.lowering import sparsity
from edgepipe.lowering.describe import (
    KernelNode,
    border_needed,
    conv_weights,
    dtype_of,
    four_dims,
    kernel_op,
    matmul_kernel,
    rows_kernel,
)
from edgepipe.lowering.elementwise import attribute, constant
from edgepipe.lowering.groups import Group, nchw, shape_of
from edgepipe.lowering.integers import blocks, geometry, kernels
from edgepipe.lowering.integers.terms import DOMAIN, integer_of
from edgepipe.lowering.sparsity import Choice


def assign(
    model: ir.Model, groups: list[Group], choices: dict[Group, Choice], context: Context
) -> None:
    """Rewrite ``model`` in place: groups become kernel nodes, with relayouts where needed."""
    _Assigner(model.graph, groups, choices, context).run()


class _Assigner:
    def __init__(
        self, graph: ir.Graph, groups: list[Group], choices: dict[Group, Choice], context: Context
    ) -> None:
        self.graph, self.context = graph, context
        self.lanes = context.target.simd.lanes_f32
        halves = context.target.halves(context.recipe)
        self.dtype = "float16" if halves else "float32"
        self.choices, self.planes = choices, sparsity.region(groups, choices)
        self.last = {g.nodes[-1]: g for g in groups}
        self.inside = {node for g in groups for node in g.nodes}
        self.layout: dict[ir.Value, Blocked] = {}  # of values that groups compute blocked
        self.stored: dict[tuple[ir.Value, Blocked], ir.Value] = {}
        self.plain: dict[ir.Value, ir.Value] = {}  # blocked values in ONNX's own order
        self.renamed: dict[ir.Value, ir.Value] = {}  # outputs of matrix products
        self.nodes: list[ir.Node] = []
        self.borders: dict[ir.Value, Pads] = defaultdict(lambda: NO_PADS)
        for group in groups:
            if group.blocked:
                integer = group.kind == "integer"
                need = geometry.border(group.anchor) if integer else self._border(group)
                value = group.inputs[0]
                have = self.borders[value]
                merged = tuple(max(a, b) for a, b in zip(have, need, strict=True))
                self.borders[value] = merged  # type: ignore[assignment]

    def run(self) -> None:
        """Walk the graph once, in order, building the new node list."""
        for node in list(self.graph):
            if node in self.last:
                self._kernel(self.last[node])
            elif node not in self.inside:
                for i, value in enumerate(node.inputs):
                    if value is not None and value in self.layout:
                        node.replace_input_with(i, self._plain(value))
                self.nodes.append(node)
        for i, value in enumerate(self.graph.outputs):
            if value in self.layout:
                plain = self._plain(value)
                name, value.name = value.name, f"{value.name}_blocked"
                plain.name = name
                self.graph.outputs[i] = plain
        self._replace_nodes()

    def _replace_nodes(self) -> None:
        old = list(self.graph)
        kept = set(self.nodes)
        for node in old:
            if node not in kept:
                for i in range(len(node.inputs)):
                    node.replace_input_with(i, None)
        self.graph.remove(old)
        self.graph.extend(self.nodes)
        used = {v for n in self.graph.all_nodes() for v in n.inputs} | set(self.graph.outputs)
        for name, value in list(self.graph.initializers.items()):
            if value not in used:
                del self.graph.initializers[name]

    # -- layouts ------------------------------------------------------------------------------

    def _own_layout(self, value: ir.Value) -> Blocked:
        """The layout a group stores ``value`` in."""
        lanes = 1 if value in self.planes else self.lanes
        return Blocked(*four_dims(value), lanes, self.borders[value], self.dtype)

    def _border(self, group: Group) -> Pads:
        """What ``group`` reads around its input, with a spare column for strides over planes."""
        top, left, bottom, right = border_needed(group)
        if group.output in self.planes and sparsity.is_depthwise(group):
            strides = group.anchor.attributes.get("strides")
            right += strides is not None and int(strides.value[-1]) == 2
        return top, left, bottom, right

    def _plain_layout(self, value: ir.Value) -> Blocked:
        if geometry.is_codes(value):
            return geometry.plain(value, geometry.IMAGE)
        return Blocked(*four_dims(value), 1, dtype=dtype_of(value))

    @staticmethod
    def _copy(have: Blocked, wanted: Blocked, name: str | None) -> KernelNode:
        codes = have.dtype in ("int8", "uint8")
        op: Op = MoveOp((have,), wanted) if codes else RelayoutOp(have, wanted)
        return KernelNode(op, "Relayout", [f"relayout {name}"], inputs=[None])

    def _as(self, value: ir.Value, wanted: Blocked) -> ir.Value:
        """``value`` stored as ``wanted``; copied by a relayout node when it is not."""
        value = self.renamed.get(value, value)
        have = self.layout.get(value, self._plain_layout(value))
        if have == wanted:
            return self.stored.get((value, wanted), value)
        key = (value, wanted)
        if key not in self.stored:
            source = self.stored.get((value, have), value)
            kernel = self._copy(have, wanted, value.name)
            self.stored[key] = self._emit(kernel, [source], wanted, f"{value.name}_{wanted}")
        return self.stored[key]

    def _plain(self, value: ir.Value) -> ir.Value:
        """A blocked value back in plain NCHW, with its ONNX shape."""
        if value not in self.plain:
            layout, wanted = self.layout[value], self._plain_layout(value)
            source, name = self.stored[value, layout], f"{value.name}_plain"
            row = layout.h == layout.w == 1 and layout.c % layout.lanes == 0
            row = row and layout.dtype == wanted.dtype
            if layout == wanted or (row and not layout.padded):
                self.plain[value] = self._reshape(source, shape_of(value), name)
            else:
                kernel = self._copy(layout, wanted, value.name)
                self.plain[value] = self._emit(kernel, [source], shape_of(value), name, value.dtype)
        return self.plain[value]

    def _reshape(self, source: ir.Value, shape: tuple[int, ...], name: str) -> ir.Value:
        """The same elements under another shape; costs nothing at run time."""
        target = ir.Value(
            name=f"{name}_shape",
            shape=ir.Shape([len(shape)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.array(shape, np.int64)),
        )
        self.graph.register_initializer(target)
        out = ir.Value(name=name, shape=ir.Shape(shape), type=source.type)
        self.nodes.append(ir.Node("", "Reshape", [source, target], outputs=[out], name=name))
        return out

    def _emit(
        self,
        kernel: KernelNode,
        inputs: list[ir.Value],
        layout: Blocked | tuple[int, ...],
        name: str,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        shape = layout.shape if isinstance(layout, Blocked) else layout
        if isinstance(layout, Blocked):
            dtype = ir.DataType.from_numpy(np.dtype(layout.dtype))
        type_ = ir.TensorType(ir.DataType.FLOAT if dtype is None else dtype)
        out = ir.Value(name=name, shape=ir.Shape(shape), type=type_)
        kind = type(kernel.op).__name__.removesuffix("Op")
        node = ir.Node("edgepipe", kind, inputs, outputs=[out], name=kernel.names[0])
        node.meta["kernel"] = kernel
        self.nodes.append(node)
        return out

    # -- groups -------------------------------------------------------------------------------

    def _kernel(self, group: Group) -> None:
        if group.kind == "integer":
            self._integer_kernel(group)
            return
        if not group.blocked:
            self._plain_kernel(group)
            return
        y = self._own_layout(group.output)
        inputs = [self._input_layout(group, value) for value in group.inputs[: self._arity(group)]]
        residuals, arrays, values = self._operands(group, y)
        choice = self.choices.get(group)
        op = kernel_op(group, inputs, y, residuals)
        if choice is not None and isinstance(op, ConvOp):
            op = replace(op, sparse=choice.form)
        kernel = KernelNode(
            op,
            group.anchor.op_type,
            [n.name or n.op_type for n in group.nodes],
            weights=conv_weights(group.anchor) if group.kind.startswith("conv") else [],
            inputs=[None] * len(inputs),
            residuals=arrays,
            sparsity=None if choice is None else choice.audit(),
        )
        sources = [
            self._as(v, layout) for v, layout in zip(group.inputs, inputs, strict=False)
        ] + values
        out = self._emit(kernel, sources, y, f"{group.output.name}_{y}")
        self.layout[group.output] = y
        self.stored[group.output, y] = out

    def _integer_kernel(self, group: Group) -> None:
        """A node over codes: images NHWC with a border, rows as they are."""
        node, output = group.anchor, group.output
        view = geometry.view_of(node)
        pads = self.borders[output] if view == geometry.IMAGE else NO_PADS
        y = geometry.layout(output, view, self.lanes, pads)
        borders = [geometry.border(node), *[NO_PADS] * len(group.inputs)]
        layouts = [
            self._seen_by(v, view, pads) for v, pads in zip(group.inputs, borders, strict=False)
        ]
        op = kernels.describe(node, layouts, y)
        assert not isinstance(op, str), op
        own, names = len(group.inputs), [node.name or node.op_type]
        if node.domain == DOMAIN:
            integer = integer_of(node)
            names = list(integer.names) or names
            own = len(integer.term.inputs) if integer.term.kind == "product" else own
        weights = kernels.weights_of(node)
        others: list[np.ndarray | None] = [None] * (len(group.inputs) - own)
        zeros = None
        if isinstance(op, QConvOp):
            op, zeros = blocks.choose(op, weights[0], names[0], self.context)
        kernel = KernelNode(op, node.op_type, names, weights, [None] * own, others, zeros)
        if view == geometry.IMAGE:
            pairs = zip(group.inputs, layouts, strict=True)
            sources = [self._as(v, wanted) for v, wanted in pairs]
            self.layout[output] = y
            self.stored[output, y] = self._emit(kernel, sources, y, f"{output.name}_{y}")
            return
        sources = [
            self._plain(v) if v in self.layout else self.renamed.get(v, v) for v in group.inputs
        ]
        self._rename(
            output,
            self._emit(kernel, sources, shape_of(output), f"{output.name}_rows", output.dtype),
        )

    def _seen_by(self, value: ir.Value, view: str, pads: Pads) -> Blocked:
        """The layout in which a node over codes reads ``value``; an image needs ``pads``."""
        if view == geometry.IMAGE and value in self.layout:
            return self.layout[value]
        if not geometry.is_codes(value):
            return geometry.plain(value, view)
        return geometry.layout(value, view, self.lanes, pads if view == geometry.IMAGE else NO_PADS)

    def _rename(self, old: ir.Value, new: ir.Value) -> None:
        """Let ``new`` stand for the output ``old`` of a group that stores it in plain order."""
        self.renamed[old] = new
        new.meta.update(old.meta)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        name, old.name = old.name, None
        new.name = name

    @staticmethod
    def _arity(group: Group) -> int:
        return len(group.inputs) if group.kind == "concat" else 1

    def _input_layout(self, group: Group, value: ir.Value) -> Blocked:
        """Where the kernel reads ``value``: as its producer stores it, or in a copy."""
        n, c, h, w = four_dims(value)
        need = self._border(group)
        if group.output in self.planes:
            have = self.layout.get(value)
            return have if have and have.lanes == 1 else Blocked(n, c, h, w, 1, need, self.dtype)
        grouped = int(attribute(group.anchor, "group", 1)) > 1
        dense = group.kind.startswith("conv") and not grouped
        if value in self.layout and (dense or self.layout[value].lanes == self.lanes):
            return self.layout[value]
        if not group.kind.startswith("conv"):
            return Blocked(n, c, h, w, self.lanes, need, self.dtype)
        # Few channels (an image): scalars straight from NCHW waste no lanes.
        lanes = self.lanes if grouped or c >= self.lanes else 1
        copied = lanes > 1 or need != NO_PADS
        return Blocked(n, c, h, w, lanes, need, self.dtype if copied else dtype_of(value))

    def _operands(
        self, group: Group, y: Blocked
    ) -> tuple[list[Blocked], list[np.ndarray | None], list[ir.Value]]:
        """Layouts of the epilogue's operands, the constant ones packed, the others as values."""
        layouts: list[Blocked] = []
        arrays: list[np.ndarray | None] = []
        values: list[ir.Value] = []
        rank = len(shape_of(group.output))
        for operand in group.operands:
            shape = shape_of(operand)
            dims = nchw((1,) * (rank - len(shape)) + shape)
            assert dims is not None
            array = constant(operand)
            if array is not None:
                layout = Blocked(*dims, y.lanes, NO_PADS, y.dtype)
                arrays.append(layout.pack(array.reshape(dims).astype(y.dtype)))
            else:
                plain = Blocked(*dims, y.lanes, NO_PADS, y.dtype)
                layout = self.layout.get(operand, plain)
                if layout.lanes != y.lanes:
                    layout = plain
                arrays.append(None)
                values.append(self._as(operand, layout))
            layouts.append(layout)
        return layouts, arrays, values

    def _plain_kernel(self, group: Group) -> None:
        kernel = matmul_kernel(group) if group.kind == "matmul" else rows_kernel(group)
        choice = self.choices.get(group)
        if choice is not None and isinstance(kernel.op, MatmulOp):
            op = replace(kernel.op, sparse=choice.form)
            kernel = replace(kernel, op=op, sparsity=choice.audit())
        sources = [
            self._plain(v) if v in self.layout else self.renamed.get(v, v)
            for v in [*group.inputs, *(o for o in group.operands if constant(o) is None)]
        ]
        out = self._emit(
            kernel, sources, shape_of(group.output), f"{group.output.name}_rows", group.output.dtype
        )
        self._rename(group.output, out)
