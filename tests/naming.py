"""Networks whose tensors have names of somebody who means ill, or knows JavaScript well."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import handmade

from edgepipe.bundle import Bundle
from edgepipe.onnx_parts import OnnxParts
from edgepipe.target import Target

#: Of an object's own machinery, and what ends a literal or a comment in C, JavaScript or HTML:
#: pairs of an input and an output.
STRANGE = (
    ("__proto__", "constructor"),
    ("toString", "__proto__"),
    ("valueOf", "hasOwnProperty"),
    ("a\"b'c`${x}", "line\nbreak\u2028\u2029"),
    ("*/ // @prefix@ \\", "</script><!--"),
    ("größe→日本😀", "length"),
)


def named(path: Path, x: str, y: str) -> Bundle:
    """The handmade model for WebAssembly, one input called ``x`` and one output ``y``."""
    plan, target = handmade.plan("net"), Target.load("wasm-simd")
    plan = replace(
        plan,
        inputs=(replace(plan.inputs[0], name=x), plan.inputs[1]),
        outputs=(replace(plan.outputs[0], name=y), plan.outputs[1]),
    )
    source = handmade.source()
    proto = source.reference.proto()
    proto.graph.input[0].name = proto.graph.node[0].input[0] = x
    proto.graph.output[0].name = proto.graph.node[2].output[0] = y
    source = replace(source, reference=OnnxParts(proto.SerializeToString(), {}))
    kernels, context = handmade.objects(target, "net"), handmade.context(target)
    return handmade.write(path, source, plan, kernels, context, "net")
