"""The graph passes: from the imported model to a canonical float ONNX graph.

The result is standard ONNX (only the ai.onnx domain, opset ``editor.OPSET``) and computes what
the model computed. The order below is the architecture: each line is one file with its cases in
the docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from edgepipe.context import Context
from edgepipe.errors import EdgepipeError

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.passes.editor import Editor

STAGE = "passes"


def _passes() -> tuple[Callable[[Editor], int], ...]:
    # onnx is imported here and not with the package: the command line must answer at once.
    from edgepipe.passes import (
        activations,
        canonical,
        clean,
        decompose,
        fold,
        fuse_affine,
        fuse_batchnorm,
        fuse_input,
        fuse_pad,
        identity,
        inline,
        matmul,
        normalization,
        opset,
        reshape,
    )

    return (
        inline.run,
        opset.run,
        decompose.run,
        canonical.run,
        identity.run,
        clean.run,
        normalization.run,
        activations.run,
        fuse_batchnorm.run,
        fuse_affine.run,
        fuse_input.run,
        fuse_pad.run,
        matmul.run,
        reshape.run,
        identity.run,
        fold.run,
        clean.run,
    )


def run(model: ir.Model, context: Context) -> ir.Model:
    """Rewrite a copy of ``model`` by every pass in order; ``model`` stays as it was.

    Weights are shared with ``model``, never changed in place. Reasons why something did not
    apply go to ``context.note``; the text of the graph after each pass to ``context.dump``.
    Raises UserError for contradictions in the model; other errors carry the pass's name.
    """
    from edgepipe.passes.editor import Editor

    edit = Editor(model.clone())
    for number, step in enumerate(_passes()):
        name = step.__module__.rsplit(".", 1)[-1]
        edit.note = partial(context.note, f"{STAGE}.{name}")
        try:
            step(edit)
        except EdgepipeError:
            raise
        except Exception as error:
            error.add_note(f"in graph pass '{name}' (number {number} of {STAGE})")
            raise
        if context.dump_dir is not None:
            context.dump(f"{STAGE}-{number:02}-{name}.txt", str(edit.model))
    return edit.model
