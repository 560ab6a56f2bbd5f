"""Whose fault it is: ONNX Runtime settles whether a model that a stage fails on is one at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgepipe.errors import EdgepipeError, UserError
from edgepipe.importer.checks import first_line
from edgepipe.onnx_parts import OnnxParts

if TYPE_CHECKING:
    from edgepipe.importer.source import Source


def doubt(reference: OnnxParts, *, run: bool = False) -> str | None:
    """What ONNX Runtime has against the model ``reference``; None where it loads it, and with
    ``run`` computes it for zeros."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = reference.session(options, ["CPUExecutionProvider"])
        if run:
            dtypes = {"float": "float32", "double": "float64"}
            kinds = {i.name: i.type.removeprefix("tensor(")[:-1] for i in session.get_inputs()}
            session.run(None, {
                i.name: np.zeros(i.shape, dtypes.get(kinds[i.name], kinds[i.name]))
                for i in session.get_inputs()
            })  # fmt: skip
    except Exception as error:  # its exceptions share no base class
        return first_line(error)
    return None


@contextmanager
def judged(source: Source) -> Iterator[None]:
    """Errors of stages that read ``source`` are bugs, unless ONNX Runtime cannot run it either:
    then its attributes or shapes contradict each other, which raises UserError."""
    try:
        yield
    except (EdgepipeError, MemoryError):
        raise
    except Exception as error:
        said = doubt(source.reference, run=True)
        if said is None:
            raise
        raise UserError(
            f"cannot be compiled, and ONNX Runtime cannot run it either: {said}",
            where=source.origin,
            fix="export the model again",
        ) from error
