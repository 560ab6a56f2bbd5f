"""Operator set versions: what the reference needs so that ONNX Runtime can run it.

The model itself keeps its opset: the graph passes upgrade it operator by operator. The onnx
package's own version converter is not used, because it changes results silently (Hardmax before
opset 13, linear Upsample and Resize before 11).
"""

from __future__ import annotations

import onnx
from onnx import defs

from edgepipe.importer.checks import graphs, opset_version

# Labels are lowered no further than this: every ONNX Runtime edgepipe runs with knows them.
_KNOWN_OPSET, _KNOWN_IR = 21, 10


def runnable(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``proto`` with the lowest opset and IR version that mean the same.

    ONNX Runtime refuses models that are labelled newer than itself, even where every operator
    in them is older. An opset is only a label for operators that have not changed since.
    """
    proto.ir_version = max(proto.ir_version, 4)  # initializers need not be inputs since 4
    newer_types = any(t.data_type > onnx.TensorProto.INT4 for t in proto.graph.initializer)
    ir_version = proto.ir_version if newer_types else min(proto.ir_version, _KNOWN_IR)
    version = opset_version(proto)
    used = {node.op_type for graph in graphs(proto.graph) for node in graph.node}
    since = [defs.get_schema(op, version, "").since_version for op in used]
    lowest = min(version, max(_KNOWN_OPSET, *since)) if since else version
    if (lowest, ir_version) == (version, proto.ir_version):
        return proto
    labelled = onnx.ModelProto()
    labelled.CopyFrom(proto)
    labelled.ir_version = ir_version
    for entry in labelled.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = lowest
    return labelled
