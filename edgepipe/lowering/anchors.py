"""Nodes that can start a kernel: what each kind needs, and why a node is refused.

Each function takes a node, a predicate that says which values are in the blocked layout, and the
target. It returns None when the node qualifies, "" when it is of another kind, and a reason when
it is of this kind but in a form the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgepipe.lowering.elementwise import attribute, constant
from edgepipe.quantization import linear_resize
from edgepipe.target import Target

Blocked = Callable[[ir.Value | None], bool]
Anchor = Callable[[ir.Node, Blocked, Target], str | None]

#: Kinds that take no fused steps.
NO_EPILOGUE = frozenset({"concat", "rows", "integer"})
#: Kinds that work on row-major tensors of any rank.
PLAIN = frozenset({"matmul", "rows"})


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        return ()
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]


def ints(node: ir.Node, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """A list attribute or its default."""
    found = node.attributes.get(name)
    return default if found is None else tuple(int(v) for v in found.value)


def conv(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type != "Conv":
        return ""
    shape, weight = _shape(node.inputs[0]), constant(node.inputs[1])
    if len(shape) not in (3, 4):
        return f"{len(shape) - 2}-D"
    if weight is None:
        return "its weight is computed"
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None:
        return "its bias is computed"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}"
    if str(attribute(node, "auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
        return "auto_pad is not resolved"
    if any(p < 0 for p in ints(node, "pads", ())):
        return "negative padding"
    if 0 in _shape(node.outputs[0]):
        return "its output is empty"
    groups, lanes = int(attribute(node, "group", 1)), target.simd.lanes_f32
    c, co = shape[1], weight.shape[0]
    depthwise = groups == c == co
    if groups > 1 and not depthwise and ((c // groups) % lanes or (co // groups) % lanes):
        return f"{groups} groups of {c // groups} channels do not fill vectors of {lanes}"
    return None


def conv_transpose(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type != "ConvTranspose":
        return ""
    shape, weight = _shape(node.inputs[0]), constant(node.inputs[1])
    if len(shape) != 4:
        return f"{len(shape) - 2}-D"
    if weight is None or weight.dtype != np.float32:
        return "its weight is computed or not float32"
    if len(node.inputs) > 2 and node.inputs[2] is not None and constant(node.inputs[2]) is None:
        return "its bias is computed"
    if int(attribute(node, "group", 1)) != 1:
        return "grouped"
    if "output_shape" in node.attributes or "auto_pad" in node.attributes:
        return "its padding is not explicit"
    if any(p < 0 for p in ints(node, "pads", ())) or 0 in _shape(node.outputs[0]):
        return "negative padding or an empty result"
    if not all(_meets(node, axis) for axis in range(2)):
        return "no output sees an input"
    return None


def _meets(node: ir.Node, axis: int) -> bool:
    """Whether a tap of a ConvTranspose lies on an input for any output along a spatial axis."""
    stride, dilation = (ints(node, name, (1, 1))[axis] for name in ("strides", "dilations"))
    pad, taps = ints(node, "pads", (0,) * 4)[axis], _shape(node.inputs[1])[2 + axis]
    outputs = range(min(stride, _shape(node.outputs[0])[2 + axis]))
    return any((o + pad - tap * dilation) % stride == 0 for o in outputs for tap in range(taps))


def bilinear(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    return linear_resize.unfit(node) if blocked(node.inputs[0]) else ""


def pool(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type not in ("MaxPool", "AveragePool"):
        return ""
    if not blocked(node.inputs[0]):
        return "its input is not in the blocked layout"
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its indices are used"
    if str(attribute(node, "auto_pad", "NOTSET")) not in ("NOTSET", "VALID"):
        return "auto_pad is not resolved"
    rank = len(_shape(node.inputs[0])) - 2
    kernel = ints(node, "kernel_shape", ())
    pads = ints(node, "pads", (0,) * 2 * rank)
    dilations = ints(node, "dilations", (1,) * rank)
    if any(d != 1 for d in dilations):
        return "dilated"
    if any(p >= k for p, k in zip(pads, kernel * 2, strict=True)):
        return "a window lies in the padding alone"
    return None


def global_pool(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type in ("GlobalAveragePool", "GlobalMaxPool"):
        return None if blocked(node.inputs[0]) else "its input is not in the blocked layout"
    if node.op_type != "ReduceMean" or not blocked(node.inputs[0]):
        return ""
    rank = len(_shape(node.inputs[0]))
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or int(attribute(node, "keepdims", 1)) != 1:
        return ""
    return None if {int(a) % rank for a in axes.reshape(-1)} == set(range(2, rank)) else ""


def upsample(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type != "Resize" or not blocked(node.inputs[0]):
        return ""
    if attribute(node, "mode", "nearest") != "nearest":
        return f"mode {attribute(node, 'mode', 'nearest')}"
    source, result = _shape(node.inputs[0]), _shape(node.outputs[0])
    if (
        len(source) != 4
        or source[:2] != result[:2]
        or result[2] % source[2]
        or result[3] % source[3]
    ):
        return "not a whole factor"
    transform = attribute(node, "coordinate_transformation_mode", "half_pixel")
    rounding = attribute(node, "nearest_mode", "round_prefer_floor")
    # For whole factors these two pairs both read pixel floor(i / factor).
    if (transform, rounding) == ("asymmetric", "floor"):
        return None
    if transform in ("half_pixel", "pytorch_half_pixel") and str(rounding).startswith("round_"):
        return None
    return f"{transform} with {rounding}"


def concat(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type != "Concat" or not all(blocked(v) for v in node.inputs):
        return ""
    shapes = [_shape(v) for v in node.inputs]
    if int(attribute(node, "axis", 0)) % len(shapes[0]) != 1:
        return "not along channels"
    if any(s[1] % target.simd.lanes_f32 for s in shapes[:-1]):
        return f"channels are not a multiple of {target.simd.lanes_f32}"
    return None


def matmul(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type == "Gemm":
        return _gemm(node)
    if node.op_type != "MatMul":
        return ""
    a, b = _shape(node.inputs[0]), _shape(node.inputs[1])
    if len(a) < 2 or len(b) < 2 or 0 in a + b:
        return "a vector or an empty operand"
    if constant(node.inputs[0]) is not None:
        return "its left operand is constant"
    batch_a, batch_b = int(np.prod(a[:-2])), int(np.prod(b[:-2]))
    if batch_b != 1 and a[:-2] != b[:-2] and batch_a != 1:
        return "its batch dimensions broadcast"
    return None


def _gemm(node: ir.Node) -> str | None:
    if constant(node.inputs[1]) is None:
        return "its weight is computed"
    if int(attribute(node, "transA", 0)) or float(attribute(node, "alpha", 1.0)) != 1.0:
        return "transA or alpha"
    if constant(node.inputs[0]) is not None or 0 in _shape(node.outputs[0]):
        return "constant or empty"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    array, n = constant(bias), _shape(node.outputs[0])[1]
    if array is None or float(attribute(node, "beta", 1.0)) != 1.0:
        return "its bias is computed or scaled"
    per_column = array.size == n and array.shape[-1:] == (n,)
    return None if array.size == 1 or per_column else "bias shape"


def rows(node: ir.Node, blocked: Blocked, target: Target) -> str | None:
    if node.op_type not in ("Softmax", "LayerNormalization"):
        return ""
    shape = _shape(node.inputs[0])
    if not shape or 0 in shape or int(attribute(node, "axis", -1)) % len(shape) != len(shape) - 1:
        return "not over the last dimension"
    if constant(node.inputs[0]) is not None or any(
        v.uses() or v.is_graph_output() for v in node.outputs[1:]
    ):
        return "constant input, or its statistics are used"
    if node.op_type == "Softmax":
        return None
    arrays = [constant(v) for v in node.inputs[1:] if v is not None]
    if any(a is None or a.shape != shape[-1:] or a.dtype != np.float32 for a in arrays):
        return "scale or bias is computed or of another shape"
    return None


ANCHORS: dict[str, Anchor] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "pool": pool,
    "global_pool": global_pool,
    "upsample": upsample,
    "bilinear": bilinear,
    "concat": concat,
    "matmul": matmul,
    "rows": rows,
}
