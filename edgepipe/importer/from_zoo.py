"""Zoo networks: committed ONNX files, or torch builders whose export is kept in a cache."""

from __future__ import annotations

from collections.abc import Mapping

from edgepipe import zoo
from edgepipe.errors import UserError, did_you_mean
from edgepipe.importer import cache
from edgepipe.importer.from_onnx import load_bytes
from edgepipe.importer.source import Source, identifier


def load_zoo(name: str, given: Mapping[str, tuple[int, ...]]) -> Source:
    """Load the zoo network ``name``.

    ``given`` may replace the shapes of a network with a builder (it is built for them). The
    exported ONNX is cached, so that only the first load of a network needs torch.
    """
    entry = zoo.describe(name)
    if entry.file:
        return load_bytes(entry.path(entry.file).read_bytes(), identifier(name), name, given)
    known = {i.name: i for i in entry.inputs}
    for key, shape in given.items():
        if key not in known:
            raise UserError(
                f"{name} has no input '{key}'", where="--shape", fix=did_you_mean(key, known)
            )
        if len(shape) != len(known[key].shape) or min(shape, default=1) < 1:
            raise UserError(
                f"{key}={','.join(map(str, shape))} does not fit {name}",
                where="--shape",
                fix=f"the shape is like {','.join(map(str, known[key].shape))}",
            )
    shapes = {i.name: given.get(i.name, i.shape) for i in entry.inputs}
    key = cache.key(entry, shapes)
    content = cache.read(name, key)
    if content is None:
        from edgepipe.importer.from_torch import export_zoo

        content = export_zoo(entry, shapes)
        cache.write(name, key, content)
    return load_bytes(content, identifier(name), name, {})
