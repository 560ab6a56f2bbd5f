"""ONNX nodes and their fused steps described as kernel ops: shapes, attributes, weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgepipe.codegen.plan import SparseAudit
from edgepipe.kernels.epilogue import Step
from edgepipe.kernels.layout import NO_PADS, Blocked, Pads
from edgepipe.kernels.ops import (
    BilinearOp,
    ConcatOp,
    ConvOp,
    ConvTransposeOp,
    GlobalPoolOp,
    LayerNormOp,
    MapOp,
    MatmulOp,
    Op,
    PoolOp,
    SoftmaxOp,
    UpsampleOp,
)
from edgepipe.kernels.weights import FLOAT32
from edgepipe.lowering.anchors import ints
from edgepipe.lowering.elementwise import attribute, constant
from edgepipe.lowering.groups import Group, nchw, shape_of
from edgepipe.lowering.weights import format_of, stored

HALF = "float16"


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
    #: Of a kernel whose weights have many zeros: what the manifest says about them.
    sparsity: SparseAudit | None = None


def dtype_of(value: ir.Value | None) -> str:
    """What the elements of a float value are in memory."""
    return HALF if value is not None and value.dtype == ir.DataType.FLOAT16 else "float32"


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
        format_of(node.inputs[1]),
    )


def kernel_op(group: Group, inputs: list[Blocked], y: Blocked, residuals: list[Blocked]) -> Op:
    """The op of a blocked group, given the layouts of what it reads and writes."""
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
        groups, weights = int(attribute(node, "group", 1)), format_of(node.inputs[1])
        return ConvOp(groups=groups, weights=weights, **shared)  # type: ignore[arg-type]
    return PoolOp(
        "max" if node.op_type == "MaxPool" else "average",
        count_include_pad=bool(attribute(node, "count_include_pad", 0)),
        pads_end=(bottom, right),
        **shared,  # type: ignore[arg-type]
    )


def conv_weights(node: ir.Node) -> list[np.ndarray]:
    """Weight with two spatial dimensions, its scales if it is stored so, the bias or zeros."""
    arrays = _weight_arrays(node.inputs[1])
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    arrays = [a[:, :, None] if a.ndim == 3 else a for a in arrays]
    channels = arrays[0].shape[1 if node.op_type == "ConvTranspose" else 0]
    return [*arrays, np.zeros(channels, np.float32) if bias is None else bias]


def _weight_arrays(value: ir.Value | None) -> list[np.ndarray]:
    """A weight as kernels store it: the array, or codes and scales."""
    found = stored(value)
    if found is None:
        weight = constant(value)
        assert weight is not None
        return [weight]
    return [found.array] if found.scale is None else [found.array, found.scale]


def _matrices(node: ir.Node, k: int, n: int) -> list[np.ndarray]:
    """The constant right operand as ``[k, n]``, and its scales as ``[n]`` or ``[groups, n]``."""
    arrays = _weight_arrays(node.inputs[1])
    if node.op_type == "Gemm" and int(attribute(node, "transB", 0)):
        arrays = [a.T for a in arrays]
    return [arrays[0].reshape(k, n), *(a if a.ndim == 1 else a.reshape(-1, n) for a in arrays[1:])]


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
        c = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if c is not None:
            bias = np.broadcast_to(c.reshape(-1), (out[-1],))
    packed = b is not None and batch_b == 1
    if packed:
        weights += _matrices(node, a[-1], out[-1])
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
        weights=format_of(node.inputs[1]) if packed else FLOAT32,
        a_dtype=dtype_of(node.inputs[0]),
        b_dtype=dtype_of(None if packed else node.inputs[1]),
        y_dtype=dtype_of(group.output),
        residual_dtypes=tuple(map(dtype_of, operands)) if HALF in map(dtype_of, operands) else (),
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


def rows_kernel(group: Group) -> KernelNode:
    """The kernel of a Softmax or LayerNormalization."""
    node = group.anchor
    shape = shape_of(node.outputs[0])
    rows, n = int(np.prod(shape[:-1])), shape[-1]
    weights = [a for a in map(constant, node.inputs[1:]) if a is not None]
    dtypes = dtype_of(node.inputs[0]), dtype_of(group.output)
    op: Op = SoftmaxOp(rows, n, *dtypes)
    if node.op_type == "LayerNormalization":
        epsilon = float(attribute(node, "epsilon", 1e-5))
        op = LayerNormOp(rows, n, epsilon, len(weights) > 1, *dtypes)
    return KernelNode(op, node.op_type, [node.name or node.op_type], weights, inputs=[None])
