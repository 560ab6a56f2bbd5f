"""External data: weights that an ONNX file keeps in other files, read from its folder only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

import onnx

from edgepipe.errors import UserError
from edgepipe.importer.checks import tensor_bytes


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def embed(proto: onnx.ModelProto, path: Path, digest: _Digest) -> None:
    """Read every external tensor of ``proto`` (at ``path``) into the message itself.

    ``digest`` is updated with each data file's name and content once, in sorted order.
    Raises UserError for a location outside the model's folder (absolute, ``..``, or through a
    symbolic link), a missing or short file, and a length that contradicts the tensor's shape.
    """
    external = [t for t in tensors(proto.graph) if t.data_location == onnx.TensorProto.EXTERNAL]
    files: dict[str, bytes] = {}
    for tensor in external:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        location = fields.get("location", "")
        where = f"{path.name}, tensor '{tensor.name}'"
        if location not in files:
            files[location] = _read(path.parent, location, where)
        tensor.raw_data = _slice(files[location], fields, tensor, location, where)
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    for location in sorted(files):
        digest.update(location.encode())
        digest.update(files[location])


def tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor stored in ``graph`` and its subgraphs: initializers and attributes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from tensors(subgraph)


def _read(folder: Path, location: str, where: str) -> bytes:
    outside = UserError(
        f"external data '{location}' is outside of the model's folder",
        where=where,
        fix="put the data file beside the model and name it relative to it",
    )
    if not location:
        raise UserError("external data names no file", where=where, fix="export the model again")
    windows = PureWindowsPath(location)
    if PurePosixPath(location).is_absolute() or windows.is_absolute() or windows.drive:
        raise outside
    if ".." in windows.parts:  # splits at both kinds of slash
        raise outside
    file = folder / location
    root = folder.resolve()
    if not file.resolve().is_relative_to(root):
        raise outside
    if not file.is_file():
        raise UserError(
            f"external data file '{location}' is missing",
            where=where,
            fix="copy it beside the model",
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read '{location}': {error.strerror}", where=where) from None


def _slice(
    content: bytes, fields: dict[str, str], tensor: onnx.TensorProto, location: str, where: str
) -> bytes:
    needed = tensor_bytes(tensor, where)
    try:
        offset = int(fields.get("offset") or 0)
        length = int(fields.get("length") or needed)
    except ValueError:
        raise UserError("external data has a malformed offset or length", where=where) from None
    if offset < 0 or length != needed:
        raise UserError(
            f"external data has {length} bytes at offset {offset}, its shape needs {needed}",
            where=where,
            fix="export the model again",
        )
    if offset + length > len(content):
        raise UserError(
            f"external data file '{location}' is too short ({len(content)} bytes, "
            f"{offset + length} needed)",
            where=where,
            fix="copy it again, it may be truncated",
        )
    return content[offset : offset + length]
