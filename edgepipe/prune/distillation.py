"""Trains what pruning has left towards the dense network, on calibration data, without labels.

Layer by layer, weights are fitted to what the dense layer puts out (``layers``); what errors of
layers do to one another, and to the network's outputs, only training of all of them together sees
(Hinton et al. 2015, arXiv 1503.02531). A few hundred samples are enough for that, since every one
of them tells as many numbers as the network has outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe.context import Context
from edgepipe.quantization.finetune import FinetuneSettings
from edgepipe.quantization.finetune import run as finetune
from edgepipe.sparsity.pattern import KEPT

if TYPE_CHECKING:
    import onnx_ir as ir

#: Samples of a step, and the rate where outputs of convolutions are normalized meanwhile.
BATCH, RATE = 32, 8e-3
#: Fewer samples than this are no batch to normalize by; weights then move at the smaller rate.
LEAST, SLOW = 8, 2e-3


def run(
    model: ir.Model,
    dense: ir.Model,
    samples: Sequence[Mapping[str, Any]],
    epochs: int,
    context: Context,
) -> ir.Model:
    """``model``, a pruned copy of ``dense``, trained for ``epochs`` over ``samples`` (inputs by
    name, one inference each); its zeros stay.

    Outputs are compared by their squared errors; images are moved and mirrored meanwhile. Raises
    UserError where torch is missing and Unsupported for operators that cannot be trained.
    """
    inputs = {name: np.concatenate([s[name] for s in samples]) for name in samples[0]}
    images = all(a.ndim == 4 and a.dtype == np.float32 for a in inputs.values())
    normalized, pattern = len(samples) >= LEAST, context.recipe.sparsity
    assert pattern is not None
    settings = FinetuneSettings(
        epochs=epochs,
        batch=BATCH,
        learning_rate=RATE if normalized else SLOW,
        loss="squared_error",
        distillation=1.0,
        augmentation="shift_flip" if images else "none",
        sparsity="" if pattern.channels else KEPT,
        normalization="batch" if normalized else "none",
    )

    def told(line: str) -> None:  # without the loss, so that epochs are one line of a summary
        context.progress(line.partition(":")[0])

    context.progress("training towards the dense network")
    own = replace(context, progress=told)
    return finetune(model, None, (inputs, None), settings, own, dense)
