"""Operator set versions: what the reference needs so that ONNX Runtime can run it.

The model itself keeps its opset: the graph passes upgrade it operator by operator. The onnx
package's own version converter is not used, because it changes results silently (Hardmax before
opset 13, linear Upsample and Resize before 11).
"""

from __future__ import annotations

import onnx
from onnx import defs

from edgepipe.importer.checks import graphs, opset_version

#: The newest opset and IR version ONNX Runtime 1.31 loads.
_RUNTIME_OPSET, _RUNTIME_IR = 26, 13


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
