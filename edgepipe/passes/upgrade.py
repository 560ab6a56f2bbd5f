"""Rewrites of operators from older ONNX versions to their form in ``editor.OPSET``.

One function per change of the standard (source: the version notes of the ONNX operator
reference). ``ADAPTERS`` maps an operator to its changes; ``apply`` runs those newer than the
model's opset, oldest first, on a node whose input shapes are known.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx import defs

from edgepipe.errors import Unsupported
from edgepipe.passes import decompose, rewrite_math
from edgepipe.passes.editor import OPSET, Array, Editor, array_of, is_op, shape_of

Adapter = Callable[[Editor, ir.Node], None]
ADAPTERS: dict[str, list[tuple[int, Adapter]]] = defaultdict(list)


def apply(edit: Editor, node: ir.Node, opset: int) -> None:
    """Bring ``node`` from ``opset`` to the canonical opset. Raises Unsupported."""
    if node.domain != "":
        return
    opset = node.version or opset
    node.version = opset
    if is_op(node, "Range"):
        _scalars(edit, node)
    if is_op(node, "SpaceToDepth"):
        mode = node.attributes.pop("mode", None)
        if mode is not None and mode.as_string() == "CRD":
            rewrite_math.space_to_depth_crd(edit, node)
    if newer_than_canonical(node, opset):
        decompose.expand(edit, node, native=False)
        return
    for version, adapter in ADAPTERS.get(node.op_type, ()):
        if opset < version:
            adapter(edit, node)
    node.version = OPSET


def _scalars(edit: Editor, node: ir.Node) -> None:
    # Exporters pass vectors of one element; runtimes accept them, the standard does not.
    for index, value in enumerate(node.inputs):
        dims = shape_of(value)
        if dims is not None and dims != () and math.prod(dims) == 1:
            target = edit.constant(np.zeros(0, np.int64), "scalar")
            node.replace_input_with(index, edit.insert(node, "Reshape", [value, target]))


def newer_than_canonical(node: ir.Node, opset: int) -> bool:
    """Whether ``node`` uses what the canonical opset does not have (new types are no matter)."""
    if opset <= OPSET:
        return False
    has = defs.has(node.op_type, OPSET, "")
    schema = defs.get_schema(node.op_type, OPSET, "") if has else None
    if schema is None or len(node.inputs) > schema.max_input:
        return True
    for name in list(node.attributes):
        if name in schema.attributes:
            continue
        if name in ("round_mode", "stash_type"):
            node.attributes.pop(name)  # concern float8 and the accumulation of half floats
            continue
        return True
    return node.op_type in ("BitShift", "Mod", "Celu")


def label(model: ir.Model) -> None:
    """Declare the opset: the canonical one, or a newer one where a kept operator needs it."""
    opset = OPSET
    for node in model.graph.all_nodes():
        if node.domain == "" and not defs.has(node.op_type, OPSET, ""):
            newest = defs.get_schema(node.op_type, defs.onnx_opset_version(), "")
            opset = max(opset, newest.since_version)
    for graph in model.graphs():
        graph.opset_imports[""] = opset


def _since(version: int, *op_types: str) -> Callable[[Adapter], Adapter]:
    def register(adapter: Adapter) -> Adapter:
        for op_type in op_types:
            ADAPTERS[op_type].append((version, adapter))
            ADAPTERS[op_type].sort(key=lambda item: item[0])
        return adapter

    return register


def refuse(node: ir.Node, what: str, fix: str) -> Unsupported:
    """The error for an old form that has no equivalent."""
    return Unsupported(what, where=f"{node.op_type} '{node.name}'", fix=fix)


def _attribute_to_input(edit: Editor, node: ir.Node, name: str, index: int) -> None:
    attribute = node.attributes.pop(name, None)
    if attribute is None:
        return
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    values = np.array(attribute.value, np.int64)
    node.replace_input_with(index, edit.constant(values, f"{node.name}/{name}"))


@_since(
    7,
    *("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less", "Gemm"),
)
def _broadcast(edit: Editor, node: ir.Node) -> None:
    # Opset 6 aligned the second operand at ``axis`` instead of at the last axis.
    axis = node.attributes.pop("axis", None)
    node.attributes.pop("broadcast", None)
    left, right = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    if axis is None or left is None or right is None:
        return
    first = axis.as_int() % len(left)
    padded = [*right, *[1] * (len(left) - first - len(right))]
    target = edit.constant(np.array(padded, np.int64), "aligned")
    node.replace_input_with(1, edit.insert(node, "Reshape", [node.inputs[1], target]))


@_since(7, "PRelu")
def _slope(edit: Editor, node: ir.Node) -> None:
    dims, slope = shape_of(node.inputs[0]), shape_of(node.inputs[1])
    if dims is None or slope is None or len(slope) != 1 or slope == (1,):
        return
    target = edit.constant(np.array([slope[0], *[1] * (len(dims) - 2)], np.int64), "aligned")
    node.replace_input_with(1, edit.insert(node, "Reshape", [node.inputs[1], target]))


@_since(7, "BatchNormalization", "Dropout")
def _is_test(edit: Editor, node: ir.Node) -> None:
    node.attributes.pop("is_test", None)
    node.attributes.pop("consumed_inputs", None)


@_since(13, "Squeeze", "Unsqueeze", "ReduceSum")
@_since(
    18,
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
    *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
)
def _axes(edit: Editor, node: ir.Node) -> None:
    _attribute_to_input(edit, node, "axes", 1)


@_since(13, "Split")
def _split(edit: Editor, node: ir.Node) -> None:
    _attribute_to_input(edit, node, "split", 1)


@_since(18, "Split")
def _split_parts(edit: Editor, node: ir.Node) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes.add(ir.AttrInt64("num_outputs", len(node.outputs)))


@_since(10, "TopK")
def _top_k(edit: Editor, node: ir.Node) -> None:
    k = node.attributes.pop("k").as_int()
    node.resize_inputs(2)
    node.replace_input_with(1, edit.constant(np.array([k], np.int64), f"{node.name}/k"))


@_since(10, "Slice")
def _slice(edit: Editor, node: ir.Node) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        _attribute_to_input(edit, node, name, index)


@_since(11, "Clip")
def _clip(edit: Editor, node: ir.Node) -> None:
    bounds = [node.attributes.pop(name, None) for name in ("min", "max")]
    dtype = node.inputs[0].dtype.numpy()  # type: ignore[union-attr]
    inputs = [
        None
        if bound is None or abs(bound.as_float()) > 3.4e38
        else edit.constant(np.array(bound.as_float(), dtype), f"{node.name}/bound")
        for bound in bounds
    ]
    edit.set_inputs(node, [node.inputs[0], *inputs])


@_since(12, "Dropout")
def _dropout(edit: Editor, node: ir.Node) -> None:
    node.attributes.pop("ratio", None)


@_since(11, "Pad")
def _pad(edit: Editor, node: ir.Node) -> None:
    value = node.attributes.pop("value", None)
    _attribute_to_input(edit, node, "pads", 1)
    if value is not None and value.as_float() != 0:
        node.resize_inputs(3)
        dtype = node.inputs[0].dtype.numpy()  # type: ignore[union-attr]
        fill = edit.constant(np.array(value.as_float(), dtype), f"{node.name}/value")
        node.replace_input_with(2, fill)


@_since(9, "BatchNormalization")
def _batchnorm_spatial(edit: Editor, node: ir.Node) -> None:
    spatial = node.attributes.pop("spatial", None)
    if spatial is not None and not spatial.as_int():
        raise refuse(node, "spatial=0 is not supported", "export with opset 9 or newer")


@_since(14, "BatchNormalization")
def _batchnorm_outputs(edit: Editor, node: ir.Node) -> None:
    # Before opset 14, reading the statistics outputs selected training mode.
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise refuse(node, "training mode is not supported", "export after model.eval()")
    node.resize_outputs(1)


@_since(13, "Softmax", "LogSoftmax", "Hardmax")
def _softmax(edit: Editor, node: ir.Node) -> None:
    # Before opset 13 the operator normalised over all axes from ``axis`` on, taken as one.
    dims = shape_of(node.inputs[0])
    axis = node.attributes.get_int("axis", 1)
    if dims is None:
        raise refuse(node, "needs a static shape", "fix symbolic dimensions with --shape")
    axis = axis + len(dims) if axis < 0 else axis
    if math.prod(dims[axis + 1 :]) == 1 and axis < len(dims):
        node.attributes.add(ir.AttrInt64("axis", axis))
        return
    rows = math.prod(dims[:axis])
    flat = edit.constant(np.array([rows, math.prod(dims[axis:])], np.int64), "flat")
    full = edit.constant(np.array(dims, np.int64), "full")
    flattened = edit.insert(node, "Reshape", [node.inputs[0], flat])
    result = edit.insert(node, node.op_type, [flattened], {"axis": -1})
    edit.become(node, "Reshape", [result, full])


@_since(10, "Upsample")
def _upsample(edit: Editor, node: ir.Node) -> None:
    mode = node.attributes.get_string("mode", "nearest")
    scales = node.attributes.get_floats("scales", None)
    values = array_of(node.inputs[1]) if scales is None else np.array(scales, np.float32)
    if values is None:
        raise refuse(node, "its scales are not constant", "export with constant scales")
    _old_resize(edit, node, str(mode), values)


@_since(11, "Resize")
def _resize(edit: Editor, node: ir.Node) -> None:
    scales = array_of(node.inputs[1])
    if scales is None:
        raise refuse(node, "its scales are not constant", "export with opset 11 or newer")
    _old_resize(edit, node, str(node.attributes.get_string("mode", "nearest")), scales)


def _old_resize(edit: Editor, node: ir.Node, mode: str, scales: Array) -> None:
    # Opset 10 took the left neighbour when enlarging and the right one when shrinking.
    attributes: dict[str, object] = {
        "mode": "linear" if mode == "bilinear" else mode,
        "coordinate_transformation_mode": "asymmetric",
    }
    if mode == "nearest":
        if (scales < 1).any() and (scales > 1).any():
            raise refuse(node, "enlarges and shrinks at once", "export with opset 11 or newer")
        attributes["nearest_mode"] = "ceil" if (scales < 1).any() else "floor"
    value = edit.constant(scales.astype(np.float32), f"{node.name}/scales")
    edit.become(node, "Resize", [node.inputs[0], None, value], attributes)


@_since(13, "Resize")
def _resize_tf(edit: Editor, node: ir.Node) -> None:
    mode = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if mode == "tf_half_pixel_for_nn":
        raise refuse(node, f"{mode} is not supported", "export with opset 13 or newer")


@_since(11, "Scatter")
def _scatter(edit: Editor, node: ir.Node) -> None:
    node.op_type = "ScatterElements"


@_since(9, "Scan")
def _scan(edit: Editor, node: ir.Node) -> None:
    raise refuse(node, "the batched Scan of opset 8 is not supported", "export with opset 9")


@_since(16, "RoiAlign")
def _roi_align(edit: Editor, node: ir.Node) -> None:
    if "coordinate_transformation_mode" not in node.attributes:
        mode = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
        node.attributes.add(mode)


@_since(20, "GridSample")
def _grid_sample(edit: Editor, node: ir.Node) -> None:
    mode = node.attributes.get_string("mode", "bilinear")
    renamed = {"bilinear": "linear", "bicubic": "cubic"}.get(str(mode), str(mode))
    node.attributes.add(ir.AttrString("mode", renamed))


@_since(20, "DFT")
def _dft(edit: Editor, node: ir.Node) -> None:
    axis = node.attributes.pop("axis", None)
    node.resize_inputs(3)
    value = np.array(1 if axis is None else axis.as_int(), np.int64)
    node.replace_input_with(2, edit.constant(value, f"{node.name}/axis"))


@_since(21, "GroupNormalization")
def _group_norm(edit: Editor, node: ir.Node) -> None:
    # Scale and bias were per group, now per channel.
    dims, groups = shape_of(node.inputs[0]), node.attributes.get_int("num_groups")
    if dims is None or groups is None:
        raise refuse(node, "needs a static shape", "fix symbolic dimensions with --shape")
    shapes = ([groups, 1], [groups, dims[1] // groups], [dims[1]])
    column, full, flat = (edit.constant(np.array(s, np.int64), "shape") for s in shapes)
    for index in (1, 2):
        value = edit.insert(node, "Reshape", [node.inputs[index], column])
        value = edit.insert(node, "Expand", [value, full])
        node.replace_input_with(index, edit.insert(node, "Reshape", [value, flat]))
