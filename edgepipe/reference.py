"""The original model behind a bundle: found again, checked, and run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepipe import importer, zoo
from edgepipe.data import Inputs
from edgepipe.errors import UserError
from edgepipe.onnx_parts import OnnxParts
from edgepipe.onnx_session import open_session
from edgepipe.recipe import Recipe
from edgepipe.target import Target
from edgepipe.zoo import Preprocessing

if TYPE_CHECKING:
    import onnxruntime

    from edgepipe.bundle import Bundle
    from edgepipe.float64 import Float64Model
    from edgepipe.importer.source import Source


class Reference:
    """The float model at the bundle's input shapes, in ONNX Runtime and in float64."""

    def __init__(self, source: Source, preprocessing: Preprocessing | None = None) -> None:
        self.source, self.preprocessing = source, preprocessing

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """ONNX Runtime on one thread, CPU."""
        return session(self.source.reference)

    @cached_property
    def _float64(self) -> Float64Model:
        from edgepipe.float64 import Float64Model

        return Float64Model(self.source.proto)

    def run(self, inputs: Inputs) -> Inputs:
        """Outputs by name for one run's inputs."""
        return run_session(self.session, inputs)

    def integers(self) -> Callable[[Inputs], Inputs]:
        """Of a Q/DQ model: its integer arithmetic by definition."""
        from edgepipe import passes, quantize
        from edgepipe.context import Context
        from edgepipe.integer_reference import integer_run

        context = Context(Target.load("x86-64-v3"), Recipe())  # no pass asks for the target
        return integer_run(quantize.onnx_bytes(passes.run(self.source.model, context)))

    def run_float64(self, inputs: Inputs) -> Inputs:
        """The same in double precision."""
        return self._float64.run(inputs)


def session(
    model: bytes | OnnxParts, integer_kernels: bool | None = None, threads: int = 1
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session. Raises UserError where it refuses the model."""
    try:
        return open_session(model, integer_kernels=integer_kernels, threads=threads)
    except Exception as error:  # its exceptions have no common public base
        said = " ".join(str(error).split())[:200]
        raise UserError(f"ONNX Runtime refuses the reference model: {said}") from None


def quantized_runs(model: bytes) -> tuple[Callable[[Inputs], Inputs], ...]:
    """Both ways in which ONNX Runtime executes a Q/DQ model (see ``edgepipe.onnx_session``)."""
    return tuple(partial(run_session, session(model, kernels)) for kernels in (True, False))


def run_session(session: onnxruntime.InferenceSession, inputs: Inputs) -> Inputs:
    """Outputs by name for one run's inputs."""
    names = [output.name for output in session.get_outputs()]
    values = session.run(names, inputs)
    return dict(zip(names, map(np.asarray, values), strict=True))


def open_reference(bundle: Bundle, model: str | Path | None = None) -> Reference:
    """The original of ``bundle``: ``model``, or what the manifest's origin leads to.

    Raises UserError where it is not found or is not the model the bundle was compiled from.
    """
    if model is None:
        return find_reference(bundle)
    source = importer.load(model, {spec.name: tuple(spec.shape) for spec in bundle.inputs})
    wanted = bundle.manifest["source"]["sha256"]
    if source.sha256 != wanted:
        raise UserError(
            f"is not the model that the bundle was compiled from (sha256 {source.sha256[:12]}…, "
            f"the manifest says {wanted[:12]}…)",
            where=str(model),
            fix="compile it again, or give the right one with --model",
        )
    origin = bundle.manifest["source"]["origin"]
    steps = zoo.describe(origin).preprocessing if origin in zoo.names() else None
    return Reference(source, steps)


def find_reference(bundle: Bundle) -> Reference:
    """The original by the manifest's origin: a zoo name, or a file of that name in the current
    folder or beside the bundle. A ``package.module:factory`` is code, and a manifest may come from
    anywhere: it is not called unless the user names it. Raises UserError."""
    origin: str = bundle.manifest["source"]["origin"]
    if origin in zoo.names():
        return open_reference(bundle, origin)
    if Path(origin).suffix.lower() in (".onnx", ".pt2") and Path(origin).name == origin:
        for folder in (Path(), bundle.path.parent, bundle.path.parent.parent):
            if (folder / origin).is_file():
                return open_reference(bundle, folder / origin)
    raise UserError(
        f"the original model '{origin}' is code, which is not run unasked"
        if ":" in origin
        else f"the original model '{origin}' is neither here nor beside the bundle",
        where=bundle.path.name,
        fix="name it with --model",
    )
