"""What a node must be for its operator: known, complete, with attributes that mean something."""

from __future__ import annotations

import onnx
from onnx import defs

from edgepipe.errors import Unsupported, UserError, did_you_mean

STANDARD = ("", "ai.onnx")

_PADDING = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID", "")
_RNN = ("forward", "reverse", "bidirectional")
_REDUCTIONS = ("none", "add", "mul", "max", "min")
#: (operator, or "" for any; attribute) → the words that ONNX defines. Engines take others for one
#: of these, and not all for the same.
_WORDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("", "auto_pad"): _PADDING,
    ("Resize", "mode"): ("nearest", "linear", "cubic"),
    ("Upsample", "mode"): ("nearest", "linear", "bilinear"),
    ("Resize", "nearest_mode"): ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"),
    ("Resize", "keep_aspect_ratio_policy"): ("stretch", "not_larger", "not_smaller"),
    ("Resize", "coordinate_transformation_mode"): (
        "half_pixel",
        "half_pixel_symmetric",
        "pytorch_half_pixel",
        "align_corners",
        "asymmetric",
        "tf_half_pixel_for_nn",
        "tf_crop_and_resize",
    ),
    ("Pad", "mode"): ("constant", "reflect", "edge", "wrap"),
    ("DepthToSpace", "mode"): ("DCR", "CRD"),
    ("GridSample", "mode"): ("linear", "bilinear", "cubic", "bicubic", "nearest"),
    ("GridSample", "padding_mode"): ("zeros", "border", "reflection"),
    ("RoiAlign", "mode"): ("avg", "max"),
    ("RoiAlign", "coordinate_transformation_mode"): ("half_pixel", "output_half_pixel"),
    ("ScatterElements", "reduction"): _REDUCTIONS,
    ("ScatterND", "reduction"): _REDUCTIONS,
    ("Gelu", "approximate"): ("none", "tanh"),
    ("BitShift", "direction"): ("LEFT", "RIGHT"),
    ("RNN", "direction"): _RNN,
    ("GRU", "direction"): _RNN,
    ("LSTM", "direction"): _RNN,
}
_AGAIN = "export the model again"


def check_node(node: onnx.NodeProto, version: int, where: str) -> None:
    """Raises Unsupported for an operator outside the standard domain, UserError for a node that
    its operator in opset ``version`` does not allow."""
    here = f"{where}, node '{node.name or (node.output[0] if node.output else '?')}'"
    if node.domain not in STANDARD:
        raise Unsupported(
            f"operator {node.domain}::{node.op_type} is not of the standard ONNX domain",
            where=here,
            fix="export the model with standard operators only",
        )
    schema = _schema(node, version, here)
    _check_inputs(node, schema, here)
    _check_attributes(node, schema, here)
    # GroupNormalization of opset 18 counts as deprecated, but has a successor that replaces it.
    if (
        schema.deprecated
        and defs.get_schema(node.op_type, defs.onnx_opset_version(), "").deprecated
    ):
        raise UserError(f"operator {node.op_type} is no longer part of opset {version}",
                        where=here, fix=_AGAIN)  # fmt: skip


def _schema(node: onnx.NodeProto, version: int, here: str) -> defs.OpSchema:
    try:
        return defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        known = {s.name for s in defs.get_all_schemas() if s.domain == ""}
    if node.op_type in known:
        raise UserError(f"operator {node.op_type} does not exist in opset {version}", where=here,
                        fix="export the model with a newer opset")  # fmt: skip
    raise UserError(f"unknown operator {node.op_type}", where=here,
                    fix=did_you_mean(node.op_type, known))  # fmt: skip


def _check_inputs(node: onnx.NodeProto, schema: defs.OpSchema, here: str) -> None:
    """ONNX Runtime reads through a null pointer where one that is needed has no name."""
    for number, name in enumerate(node.input):
        formal = schema.inputs[min(number, len(schema.inputs) - 1)] if schema.inputs else None
        if not name and formal and formal.option != defs.OpSchema.FormalParameterOption.Optional:
            raise UserError(f"{node.op_type} needs its input {number}, {formal.name}", where=here,
                            fix=_AGAIN)  # fmt: skip


def _check_attributes(node: onnx.NodeProto, schema: defs.OpSchema, here: str) -> None:
    for attribute in node.attribute:
        if attribute.ref_attr_name:  # of a function, which there are none of any more
            raise UserError(f"attribute {attribute.name} refers to '{attribute.ref_attr_name}', "
                            "which nothing defines", where=here)  # fmt: skip
        words = _WORDS.get((node.op_type, attribute.name)) or _WORDS.get(("", attribute.name))
        word = attribute.s.decode("utf-8", "replace")
        if words and word not in words:
            raise UserError(f"{node.op_type} has {attribute.name} '{word}'", where=here,
                            fix=f"known: {', '.join(filter(None, words))}")  # fmt: skip
        if node.op_type == "Constant" and attribute.name not in schema.attributes:
            # Of other operators the checker tells.
            raise UserError(f"Constant has no attribute '{attribute.name}'", where=here)
    whole = {a.name: a.i for a in node.attribute}
    axes = whole.get("batch_axis", 1), whole.get("time_axis", 0)
    if node.op_type == "ReverseSequence" and sorted(axes) != [0, 1]:
        raise UserError(f"ReverseSequence has batch_axis {axes[0]} and time_axis {axes[1]}",
                        where=here, fix="one must be 0, the other 1")  # fmt: skip
    parts = whole.get("num_outputs", len(node.output))
    if node.op_type == "Split" and parts != len(node.output):  # ONNX would count up to it
        raise UserError(f"Split into {parts} has {len(node.output)} outputs", where=here,
                        fix=_AGAIN)  # fmt: skip
