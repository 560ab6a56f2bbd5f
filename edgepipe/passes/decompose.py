"""Rewrite operators that later stages have no kernels for into operators they have.

1. Operators in ``NATIVE`` stay: the lowering has a kernel for them.
2. Operators with an entry in ``REWRITES`` (files ``rewrite_*.py``) are rewritten by it.
3. Other operators that ONNX itself defines as functions are replaced by that function's body
   (Celu, Swish, Attention, RotaryEmbedding, RMSNormalization, CenterCropPad, …).
4. Operators without any of these stay; the lowering refuses them by name if it has to.

The results are folded and decomposed again until nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx import defs

from edgepipe.passes import fold
from edgepipe.passes.editor import OPSET, Editor, owner

Rewrite = Callable[[Editor, ir.Node], bool]

#: Operators with an ONNX function body that are nevertheless kept, because there is a kernel.
NATIVE: set[str] = {
    *("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Relu"),
    *("Selu", "Shrink", "Softplus", "Softsign", "ThresholdedRelu"),
    *("Softmax", "LogSoftmax", "LayerNormalization", "GroupNormalization"),
    *("RMSNormalization", "LpNormalization", "GlobalLpPool", "Celu", "CenterCropPad"),
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
    *("GreaterOrEqual", "LessOrEqual", "DepthToSpace", "SpaceToDepth", "Range", "CastLike"),
    *("DynamicQuantizeLinear",),
}

#: Own rewrites. A rewrite returns False where it does not apply and then has changed nothing.
REWRITES: dict[str, Rewrite] = {}


def rewrites(*op_types: str) -> Callable[[Rewrite], Rewrite]:
    """Register a function as the rewrite of ``op_types``."""

    def register(rewrite: Rewrite) -> Rewrite:
        for op_type in op_types:
            assert op_type not in REWRITES, op_type
            REWRITES[op_type] = rewrite
        return rewrite

    return register


def run(edit: Editor) -> int:
    """Decompose the whole model, folding what becomes constant on the way."""
    from edgepipe.passes import upgrade

    def look(node: ir.Node) -> None:
        upgrade.apply(edit, node, OPSET)  # bodies of newer functions use newer operators
        if node.graph is not None:
            expand(edit, node)

    edit.before_visit = look
    try:
        return fold.sweep(edit, edit.model.graph)
    finally:
        edit.before_visit = None
        upgrade.label(edit.model)


def expand(edit: Editor, node: ir.Node, *, native: bool = True) -> bool:
    """Replace ``node`` unless it is native; returns whether it was replaced.

    Without ``native`` also native operators are replaced: forms that only newer opsets allow.
    """
    from edgepipe.passes import rewrite_attention, rewrite_math, rewrite_signal  # noqa: F401

    if node.domain != "" or (native and node.op_type in NATIVE):
        return False
    rewrite = REWRITES.get(node.op_type)
    if rewrite is not None and rewrite(edit, node):
        return True
    return expand_function(edit, node)


def expand_function(edit: Editor, node: ir.Node) -> bool:
    """Replace ``node`` by the function body in its ONNX schema, if it has one."""
    version = node.version or OPSET
    try:
        schema = defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        return False
    proto = _function(node, schema, version)
    if proto is None:
        return False
    function = ir.serde.deserialize_function(proto)
    attributes = dict(node.attributes)
    for name, default in schema.attributes.items():
        if name not in attributes and default.default_value.name:
            attributes[name] = ir.serde.deserialize_attribute(default.default_value)
    _bind(function, node, attributes)
    results = list(function.outputs)
    function.outputs.clear()
    nodes = list(function)
    function.remove(nodes)
    body_version = function.opset_imports.get("", version)
    for inner in nodes:
        inner.name = edit.fresh(f"{node.name}/{inner.name or inner.op_type}")
        inner.version = body_version
        for value in inner.outputs:
            if value.name:
                value.name = edit.fresh(f"{node.name}/{value.name}")
    owner(node).insert_before(node, nodes)
    edit.inserted.extend(nodes)
    for old, new in zip(node.outputs, results, strict=False):
        if old.uses() or old.is_graph_output():
            new.shape, new.type = old.shape, old.type
            edit.forward(old, new)
    edit.remove(node)
    return True


def _function(node: ir.Node, schema: defs.OpSchema, version: int) -> onnx.FunctionProto | None:
    if schema.has_function:
        return schema.function_body
    if not schema.has_context_dependent_function:
        return None
    types = []
    for value in node.inputs:
        proto = onnx.TypeProto()
        if value is not None and value.type is not None:
            ir.serde.serialize_type_into(proto, value.type)
            if value.shape is not None:
                ir.serde.serialize_shape_into(proto, value.shape)
        types.append(proto.SerializeToString())
    text = ir.serde.serialize_node(node).SerializeToString()
    usable = [
        v for v in schema.context_dependent_function_opset_versions if v <= max(version, OPSET)
    ]
    if not usable:
        return None
    body = schema.get_context_dependent_function_with_opset_version(max(usable), text, types)
    return onnx.FunctionProto.FromString(body) if body else None


def _bind(function: ir.Function, node: ir.Node, attributes: dict[str, ir.Attr]) -> None:
    """Give the function's inputs and attribute references the values of the call."""
    for index, value in enumerate(function.inputs):
        argument = node.inputs[index] if index < len(node.inputs) else None
        for user, position in tuple(value.uses()):
            user.replace_input_with(position, argument)
    for inner in function.all_nodes():
        for name, attribute in list(inner.attributes.items()):
            if not attribute.is_ref():
                continue
            inner.attributes.pop(name)
            actual = attributes.get(str(attribute.ref_attr_name))
            if actual is not None:
                inner.attributes.add(ir.Attr(name, actual.type, actual.value))
