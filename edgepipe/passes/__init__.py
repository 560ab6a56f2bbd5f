"""The graph passes: from the imported model to a canonical float ONNX graph.

The result is standard ONNX (only the ai.onnx domain, opset ``editor.OPSET``) and computes what
the model computed. ``PASSES`` is the architecture: every name is one file of this folder, with
its numbered cases in the docstring and a ``run(edit) -> number of changes``.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING

from edgepipe.context import Context
from edgepipe.errors import EdgepipeError

if TYPE_CHECKING:
    import onnx_ir as ir

STAGE = "passes"

#: In order. By name, so that onnx is imported when a model is compiled and not with the command
#: line. A pass that opens chances for an earlier one is followed by that one again.
PASSES = (
    "inline",  # local functions, constants: the form the others expect
    "opset",  # one opset; constants folded and shapes known from here on
    "quantized",  # one form of Q/DQ pairs; the passes behind it leave them alone
    "decompose",  # operators without kernels
    "canonical",  # one form for what can be said in several
    "identity",
    "clean",  # equal subexpressions become one, so that patterns meet
    "normalization",
    "activations",
    "identity",
    "fuse_batchnorm",
    "fuse_affine",
    "fuse_input",
    "fuse_pad",
    "resize",
    "matmul",
    "reshape",
    "identity",
    "fold",
    "clean",
    "finite",
)


def run(model: ir.Model, context: Context) -> ir.Model:
    """Rewrite a copy of ``model`` by every pass in order; ``model`` stays as it was.

    Input shapes must be static. Weights are shared with ``model``, never changed in place.
    Every value of the result has a static shape and a dtype, except where the data decide it
    (NonZero, NonMaxSuppression, Unique, …). Reasons why something did not apply go to
    ``context.note``; the text of the graph after each pass to ``context.dump``.
    Raises UserError for contradictions in the model; other errors carry the pass's name.
    """
    from edgepipe.passes.editor import Editor

    edit = Editor(model.clone())
    for number, name in enumerate(PASSES):
        edit.note = partial(context.note, f"{STAGE}.{name}")
        try:
            importlib.import_module(f"{__name__}.{name}").run(edit)
        except EdgepipeError:
            raise
        except Exception as error:
            error.add_note(f"in graph pass '{name}' (number {number} of {STAGE})")
            raise
        if context.dump_dir is not None:
            context.dump(f"{STAGE}-{number:02}-{name}.txt", str(edit.model))
    return edit.model
