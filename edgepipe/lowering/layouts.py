"""Chooses the layout of every value and rewrites the groups as nodes of domain ``edgepipe``.

Values of blocked groups are stored ``NCHW{lanes}c`` with the zero border that their readers'
padding asks for, so that convolutions read them as they are. A value that is needed in another
layout is copied once, by a relayout node; the manifest counts those.

Each new node carries ``meta["kernel"]``, a KernelNode: what the emitter needs besides the inputs.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import NO_PADS, Blocked, Pads
from edgepipe.kernels.ops import (
    BilinearOp,
    ConcatOp,
    ConvOp,
    ConvTransposeOp,
    GlobalPoolOp,
    MapOp,
    MatmulOp,
    Op,
    PoolOp,
    RelayoutOp,
    UpsampleOp,
)
from edgepipe.lowering.anchors import ints
from edgepipe.lowering.elementwise import attribute, constant
from edgepipe.lowering.groups import Group, nchw, shape_of


@dataclass
class KernelNode:
    """One template kernel: its op, its weights, and per argument slot a constant or an input.

    ``operands`` lists the activation arguments in order; an array is a compile-time constant,
    None stands for the next input of the node.
    """

    op: Op
    op_type: str
    names: list[str]
    weights: list[np.ndarray] = field(default_factory=list)
    inputs: list[np.ndarray | None] = field(default_factory=list)
    residuals: list[np.ndarray | None] = field(default_factory=list)


def assign(model: ir.Model, groups: list[Group], context: Context) -> None:
    """Rewrite ``model`` in place: groups become kernel nodes, with relayouts where needed."""
    _Assigner(model.graph, groups, context).run()


def four_dims(value: ir.Value) -> tuple[int, int, int, int]:
    """The value as ``[n, c, h, w]``; operands of lower rank are broadcast over what is missing."""
    shape = shape_of(value)
    dims = nchw(shape)
    if dims is None:
        dims = (1,) * (4 - len(shape)) + shape  # type: ignore[assignment]
    assert dims is not None
    return dims


def _pair(node: ir.Node, name: str, default: int) -> tuple[int, int]:
    """A spatial attribute as (vertical, horizontal); one dimension means a height of 1."""
    rank = len(shape_of(node.inputs[0])) - 2  # type: ignore[arg-type]
    values = ints(node, name, (default,) * rank)
    return (values[0], values[1]) if rank == 2 else (default, values[0])


def _pads(node: ir.Node) -> Pads:
    rank = len(shape_of(node.inputs[0])) - 2  # type: ignore[arg-type]
    pads = ints(node, "pads", (0,) * 2 * rank)
    return (pads[0], pads[1], pads[2], pads[3]) if rank == 2 else (0, pads[0], 0, pads[1])


def _kernel_shape(node: ir.Node) -> tuple[int, int]:
    if node.op_type in ("Conv", "ConvTranspose"):
        *_, kh, kw = (1, *shape_of(node.inputs[1])[2:])  # type: ignore[arg-type]
        return kh, kw
    return _pair(node, "kernel_shape", 1)


def border_needed(group: Group) -> Pads:
    """The zero border a convolution or average pooling reads around its input."""
    node = group.anchor
    if group.kind == "conv_transpose":
        return _transposed(node, *_bare(node)).border()
    if group.kind != "conv" and node.op_type != "AveragePool":
        return NO_PADS
    (kh, kw), (sy, sx), (dy, dx) = (
        _kernel_shape(node),
        _pair(node, "strides", 1),
        _pair(node, "dilations", 1),
    )
    top, left, _, _ = _pads(node)
    _, _, h, w = four_dims(node.inputs[0])  # type: ignore[arg-type]
    _, _, oh, ow = four_dims(node.outputs[0])
    below = (oh - 1) * sy + (kh - 1) * dy + 1 - top - h
    right = (ow - 1) * sx + (kw - 1) * dx + 1 - left - w
    return top, left, max(below, 0), max(right, 0)


def _bare(node: ir.Node) -> tuple[Blocked, Blocked]:
    """Input and output of a node as if stored plain: for questions about shapes alone."""
    return (
        Blocked(*four_dims(node.inputs[0]), 1),  # type: ignore[arg-type]
        Blocked(*four_dims(node.outputs[0]), 1),
    )


def _transposed(
    node: ir.Node,
    x: Blocked,
    y: Blocked,
    steps: tuple[Step, ...] = (),
    residuals: tuple[Blocked, ...] = (),
) -> ConvTransposeOp:
    return ConvTransposeOp(
        x,
        y,
        _kernel_shape(node),
        _pair(node, "strides", 1),
        _pair(node, "dilations", 1),
        _pads(node)[:2],
        steps,
        residuals,
    )


class _Assigner:
    def __init__(self, graph: ir.Graph, groups: list[Group], context: Context) -> None:
        self.graph, self.context = graph, context
        self.lanes = context.target.simd.lanes_f32
        self.last = {g.nodes[-1]: g for g in groups}
        self.inside = {node for g in groups for node in g.nodes}
        self.layout: dict[ir.Value, Blocked] = {}  # of values that groups compute blocked
        self.stored: dict[tuple[ir.Value, Blocked], ir.Value] = {}
        self.renamed: dict[ir.Value, ir.Value] = {}  # outputs of matrix products
        self.nodes: list[ir.Node] = []
        self.borders: dict[ir.Value, Pads] = defaultdict(lambda: NO_PADS)
        for group in groups:
            if group.blocked:
                value, need = group.inputs[0], border_needed(group)
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
        return Blocked(*four_dims(value), self.lanes, self.borders[value])

    def _plain_layout(self, value: ir.Value) -> Blocked:
        return Blocked(*four_dims(value), 1)

    def _as(self, value: ir.Value, wanted: Blocked) -> ir.Value:
        """``value`` stored as ``wanted``; copied by a relayout node when it is not."""
        value = self.renamed.get(value, value)
        have = self.layout.get(value, self._plain_layout(value))
        if have == wanted:
            return self.stored.get((value, wanted), value)
        key = (value, wanted)
        if key not in self.stored:
            source = self.stored.get((value, have), value)
            op = RelayoutOp(have, wanted)
            kernel = KernelNode(op, "Relayout", [f"relayout {value.name}"], inputs=[None])
            self.stored[key] = self._emit(kernel, [source], wanted, f"{value.name}_{wanted}")
        return self.stored[key]

    def _plain(self, value: ir.Value) -> ir.Value:
        """A blocked value back in plain NCHW, with its ONNX shape."""
        layout, wanted = self.layout[value], self._plain_layout(value)
        key = (value, wanted)
        if key in self.stored:
            return self.stored[key]
        source = self.stored[value, layout]
        if layout.h == layout.w == 1 and not layout.padded and layout.c % layout.lanes == 0:
            self.stored[key] = self._reshape(source, shape_of(value), f"{value.name}_plain")
            return self.stored[key]
        kernel = KernelNode(
            RelayoutOp(layout, wanted), "Relayout", [f"relayout {value.name}"], inputs=[None]
        )
        self.stored[key] = self._emit(kernel, [source], shape_of(value), f"{value.name}_plain")
        return self.stored[key]

    def _reshape(self, source: ir.Value, shape: tuple[int, ...], name: str) -> ir.Value:
        """The same elements under another shape; costs nothing at run time."""
        target = ir.Value(
            name=f"{name}_shape",
            shape=ir.Shape([len(shape)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.array(shape, np.int64)),
        )
        self.graph.register_initializer(target)
        out = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.nodes.append(ir.Node("", "Reshape", [source, target], outputs=[out], name=name))
        return out

    def _emit(
        self,
        kernel: KernelNode,
        inputs: list[ir.Value],
        layout: Blocked | tuple[int, ...],
        name: str,
    ) -> ir.Value:
        shape = layout.shape if isinstance(layout, Blocked) else layout
        out = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        kind = type(kernel.op).__name__.removesuffix("Op")
        node = ir.Node("edgepipe", kind, inputs, outputs=[out], name=kernel.names[0])
        node.meta["kernel"] = kernel
        self.nodes.append(node)
        return out

    # -- groups -------------------------------------------------------------------------------

    def _kernel(self, group: Group) -> None:
        if group.kind == "matmul":
            self._matmul(group)
            return
        y = self._own_layout(group.output)
        inputs = [self._input_layout(group, value) for value in group.inputs[: self._arity(group)]]
        residuals, arrays, values = self._operands(group, y)
        op = self._op(group, inputs, y, residuals)
        kernel = KernelNode(
            op,
            group.anchor.op_type,
            [n.name or n.op_type for n in group.nodes],
            weights=_conv_weights(group.anchor) if group.kind.startswith("conv") else [],
            inputs=[None] * len(inputs),
            residuals=arrays,
        )
        sources = [
            self._as(v, layout) for v, layout in zip(group.inputs, inputs, strict=False)
        ] + values
        out = self._emit(kernel, sources, y, f"{group.output.name}_{y}")
        self.layout[group.output] = y
        self.stored[group.output, y] = out

    @staticmethod
    def _arity(group: Group) -> int:
        return len(group.inputs) if group.kind == "concat" else 1

    def _input_layout(self, group: Group, value: ir.Value) -> Blocked:
        """Where the kernel reads ``value``: as its producer stores it, or in a copy."""
        if value in self.layout:
            return self.layout[value]
        n, c, h, w = four_dims(value)
        need = border_needed(group)
        if not group.kind.startswith("conv"):
            return Blocked(n, c, h, w, self.lanes, need)
        grouped = int(attribute(group.anchor, "group", 1)) > 1
        # Few channels (an image): scalars straight from NCHW waste no lanes.
        lanes = self.lanes if grouped or c >= self.lanes else 1
        return Blocked(n, c, h, w, lanes, need)

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
                layout = Blocked(*dims, y.lanes)
                arrays.append(layout.pack(array.reshape(dims)))
            else:
                layout = self.layout.get(operand, Blocked(*dims, y.lanes))
                arrays.append(None)
                values.append(self._as(operand, layout))
            layouts.append(layout)
        return layouts, arrays, values

    def _op(self, group: Group, inputs: list[Blocked], y: Blocked, residuals: list[Blocked]) -> Op:
        node, x = group.anchor, inputs[0]
        steps, layouts = tuple(group.steps), tuple(residuals)
        if group.kind == "concat":
            return ConcatOp(tuple(inputs), y)
        if group.kind == "map":
            return MapOp(x, y, steps, layouts)
        if group.kind == "upsample":
            return UpsampleOp(x, y, (y.h // x.h, y.w // x.w), steps, layouts)
        if group.kind == "bilinear":
            mode = attribute(node, "coordinate_transformation_mode", "half_pixel")
            return BilinearOp(str(mode), x, y, steps, layouts)
        if group.kind == "conv_transpose":
            return _transposed(node, x, y, steps, layouts)
        if group.kind == "global_pool":
            kind = "max" if node.op_type == "GlobalMaxPool" else "average"
            return GlobalPoolOp(kind, x, y, steps, layouts)
        top, left, bottom, right = _pads(node)
        shared = {
            "x": x,
            "y": y,
            "kernel": _kernel_shape(node),
            "strides": _pair(node, "strides", 1),
            "dilations": _pair(node, "dilations", 1),
            "offset": (top, left),
            "epilogue": steps,
            "residuals": layouts,
        }
        if group.kind == "conv":
            return ConvOp(groups=int(attribute(node, "group", 1)), **shared)  # type: ignore[arg-type]
        return PoolOp(
            "max" if node.op_type == "MaxPool" else "average",
            count_include_pad=bool(attribute(node, "count_include_pad", 0)),
            pads_end=(bottom, right),
            **shared,  # type: ignore[arg-type]
        )

    def _matmul(self, group: Group) -> None:
        kernel = matmul_kernel(group)
        sources = [
            self._plain(v) if v in self.layout else self.renamed.get(v, v)
            for v in [*group.inputs, *(o for o in group.operands if constant(o) is None)]
        ]
        out = self._emit(kernel, sources, shape_of(group.output), f"{group.output.name}_mm")
        self.renamed[group.output] = out
        group.output.replace_all_uses_with(out, replace_graph_outputs=True)
        name, group.output.name = group.output.name, None
        out.name = name


def _conv_weights(node: ir.Node) -> list[np.ndarray]:
    weight = constant(node.inputs[1])
    assert weight is not None
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if weight.ndim == 3:
        weight = weight[:, :, None]
    channels = weight.shape[1 if node.op_type == "ConvTranspose" else 0]
    return [weight, np.zeros(channels, np.float32) if bias is None else bias]


def matmul_kernel(group: Group) -> KernelNode:
    """The kernel of a Gemm or MatMul group."""
    node = group.anchor
    a, out = shape_of(node.inputs[0]), shape_of(node.outputs[0])  # type: ignore[arg-type]
    b_shape = shape_of(node.inputs[1])  # type: ignore[arg-type]
    b = constant(node.inputs[1])
    batch_a, batch_b = int(np.prod(a[:-2])), int(np.prod(b_shape[:-2]))
    weights: list[np.ndarray] = []
    bias: np.ndarray | None = None
    if node.op_type == "Gemm":
        assert b is not None
        if int(attribute(node, "transB", 0)):
            b = b.T
        c = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if c is not None:
            bias = np.broadcast_to(c.reshape(-1), (out[-1],))
    packed = b is not None and batch_b == 1
    if packed:
        assert b is not None
        weights.append(b.reshape(a[-1], out[-1]))
    steps, operands = list(group.steps), list(group.operands)
    if bias is None and steps and steps[0].kind == "add":
        row = constant(operands[0])
        if row is not None and row.shape == out[-1:]:
            bias = row
            steps.pop(0)
            operands.pop(0)
    if bias is not None:
        weights.append(np.ascontiguousarray(bias, np.float32))
    shared = batch_b == 1  # one right operand for every batch: the batch is more rows
    op = MatmulOp(
        batch=1 if shared else batch_b,
        m=batch_a * a[-2] if shared else a[-2],
        k=a[-1],
        n=out[-1],
        constant=packed,
        bias=bias is not None,
        b_batched=not shared,
        a_batched=shared or batch_a == batch_b,
        epilogue=tuple(steps),
        residuals=tuple("full" if shape_of(o) == out else "row" for o in operands),
    )
    inputs: list[np.ndarray | None] = [None]
    if not packed:
        inputs.append(b)
    return KernelNode(
        op,
        node.op_type,
        [n.name or n.op_type for n in group.nodes],
        weights=weights,
        inputs=inputs,
        residuals=[constant(o) for o in operands],
    )
