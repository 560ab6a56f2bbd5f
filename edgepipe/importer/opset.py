"""Operator set versions: older models are raised to one, so that passes see few dialects."""

from __future__ import annotations

import onnx
from onnx import defs, version_converter

from edgepipe.importer.checks import graphs, opset_version

#: Models below are converted up to this; 21 has blocked Q/DQ and int4, and every adapter exists.
MODERN_OPSET = 21
#: The newest opset and IR version ONNX Runtime 1.31 loads.
_RUNTIME_OPSET, _RUNTIME_IR = 26, 13


def modernize(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Convert an older ``proto`` to ``MODERN_OPSET``; kept as it is where no adapter exists."""
    if opset_version(proto) >= MODERN_OPSET:
        return proto
    try:
        converted = version_converter.convert_version(proto, MODERN_OPSET)
    except Exception:  # the C++ converter raises plain RuntimeErrors of many kinds
        return proto
    same = [o.name for o in converted.graph.output] == [o.name for o in proto.graph.output]
    return converted if same else proto


def runnable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``proto`` under an opset and IR version that ONNX Runtime loads, where one fits.

    A newer opset is only a label where every operator in use is older than it.
    """
    proto.ir_version = min(max(proto.ir_version, 4), _RUNTIME_IR)
    version = opset_version(proto)
    if version <= _RUNTIME_OPSET:
        return proto
    used = {node.op_type for graph in graphs(proto.graph) for node in graph.node}
    if any(defs.get_schema(op, version, "").since_version > _RUNTIME_OPSET for op in used):
        return proto
    relabelled = onnx.ModelProto()
    relabelled.CopyFrom(proto)
    for entry in relabelled.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = _RUNTIME_OPSET
    return relabelled
