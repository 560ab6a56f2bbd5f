"""What the importer hands on: the model to compile and the float reference it is judged by."""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from edgepipe.onnx_parts import OnnxParts


@dataclass(frozen=True, eq=False)
class Source:
    """A loaded model.

    ``name`` is a C identifier, for folders and symbols. ``origin`` is what the user typed,
    without folders, for the manifest. ``sha256`` is that of the model file (with external data:
    of the file and every data file it names), or of the exported ONNX bytes.
    ``model`` has its original opset (7 or newer), every input static, and every shape that
    inference can tell without folding constants. ``reference`` is the same float model in a form
    that ONNX Runtime can run; both read the same arrays of weights.
    """

    name: str
    origin: str
    sha256: str
    model: ir.Model
    reference: OnnxParts

    def proto_bytes(self) -> bytes:
        """The original model with fixed input shapes as a self-contained file."""
        return self.reference.whole()

    @property
    def proto(self) -> onnx.ModelProto:
        """The same as a message (made anew on every access)."""
        return self.reference.proto()


def identifier(text: str) -> str:
    """Turn ``text`` into a C identifier: ``mobilenet-v1`` → ``mobilenet_v1``."""
    name = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "model"
    return f"model_{name}" if name[0].isdigit() else name
