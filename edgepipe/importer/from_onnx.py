"""ONNX files and bytes: read, check, fix the input shapes, infer the others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from edgepipe.errors import UserError
from edgepipe.importer import checks, external_data, opset, shapes, skeleton
from edgepipe.importer.source import Source, identifier
from edgepipe.onnx_parts import OnnxParts

# Protobuf messages cannot be larger, and neither could a bundle for the devices edgepipe serves.
_MAX_BYTES = 2**31 - 1


def load_onnx(path: Path, given: Mapping[str, tuple[int, ...]]) -> Source:
    """Load an ``.onnx`` file; external data is read from the file's own folder only."""
    digest = hashlib.sha256()
    # Nobody here keeps the message: ``build`` frees it as soon as the weights are out of it.
    return build(_read(path, digest), identifier(path.stem), path.name, digest.hexdigest(), given)


def _read(path: Path, digest: hashlib._Hash) -> onnx.ModelProto:
    """The message in ``path`` with its external data; ``digest`` takes in all of it."""
    where = path.name
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError("the file is larger than 2 GiB", where=where, fix="use a smaller model")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=where) from None
    proto = parse(content, where)
    digest.update(content)
    del content
    external_data.embed(proto, path, digest)
    return proto


def load_bytes(
    content: bytes, name: str, origin: str, given: Mapping[str, tuple[int, ...]]
) -> Source:
    """Load a self-contained ONNX model from memory (exported torch modules, the zoo)."""
    digest = hashlib.sha256(content).hexdigest()
    return build(parse(content, origin), name, origin, digest, given)


def parse(content: bytes, where: str) -> onnx.ModelProto:
    """Parse a serialized ModelProto; UserError for anything else."""
    if not content:
        raise UserError("the file is empty", where=where, fix="export the model again")
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError:
        raise UserError(
            "is not an ONNX model, or is truncated", where=where, fix="export or download it again"
        ) from None
    # Protobuf reads many arbitrary bytes as a message of unknown fields.
    if not proto.ir_version or not proto.opset_import or not proto.HasField("graph"):
        raise UserError("is not an ONNX model", where=where, fix="export the model to ONNX")
    return proto


def build(
    proto: onnx.ModelProto,
    name: str,
    origin: str,
    sha256: str,
    given: Mapping[str, tuple[int, ...]],
) -> Source:
    """Check ``proto``, fix its input shapes and make the Source. ``proto`` is consumed."""
    proto = checks.check(proto, origin)
    shapes.drop_initializer_inputs(proto)
    shapes.fix_inputs(proto, given, origin)
    proto, weights = skeleton.take_weights(proto, origin)
    if sum(array.nbytes for array in weights.values()) > _MAX_BYTES:
        raise UserError("the model with its weights is larger than 2 GiB", where=origin)
    light = skeleton.without_weights(proto)
    checks.run_checker(light, origin)
    runnable = opset.runnable(proto).SerializeToString(deterministic=True)
    reference = OnnxParts(runnable, weights)
    shapes.infer(proto, light, origin, reference)
    model = _graph(proto, origin)
    for initializer, array in weights.items():
        model.graph.initializers[initializer].const_value = ir.tensor(array, name=initializer)
    return Source(name, origin, sha256, model, reference)


def _graph(proto: onnx.ModelProto, where: str) -> ir.Model:
    """``proto`` as onnx-ir's graph; UserError for what neither check nor checker objects to."""
    try:
        return ir.serde.deserialize_model(proto)
    except ir.serde.SerdeError as error:
        # Each level of the message wraps the error in one that prints the level.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        text = f"not a valid ONNX model: {checks.first_line(cause)}"
        raise UserError(text, where=where) from None
