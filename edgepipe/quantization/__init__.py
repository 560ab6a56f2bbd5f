"""Quantization: from the canonical float graph to a standard ONNX graph with Q/DQ pairs.

The stages of ``apply``, each one file: samples are checked (``calibration``), outliers migrated and
channels equalised (``smoothquant``, ``equalization``), biases and scalars joined (``dense``),
places chosen (``placement``), ranges observed (``observers``), weights fitted layer by layer
(``sweep``, ``weights`` and one file per method: ``reconstruction``, ``gptq``, ``adaround``,
``adaquant``; or ``nncf_ptq``), and all of it written into the graph (``qdq``, ``embedding``).
``interpreter`` runs the result in integers and defines what kernels must compute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from edgepipe.context import Context
from edgepipe.quantization.config import QuantConfig

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.quantization.executor import Rounding
    from edgepipe.quantization.graph import Array
    from edgepipe.quantization.remarks import Note

__all__ = ["QuantConfig", "apply", "fit"]

STAGE = "quantization"


def apply(
    model: ir.Model,
    config: QuantConfig,
    samples: Iterable[Mapping[str, Array]],
    context: Context,
) -> ir.Model:
    """Quantize a copy of ``model``, the result of ``edgepipe.passes.run``.

    ``samples`` are inputs of single runs: input name → array of exactly the model's shape.
    Reasons go to ``context.note``, doubts to ``context.warn``. Raises UserError for samples,
    weights or activations that cannot be quantized, naming the tensor.
    """
    from edgepipe.quantization import embedding
    from edgepipe.quantization.qdq import QdqWriter

    note = _remarks(context)
    result, rounding = fit(model, config, samples, context)
    QdqWriter(result.graph, rounding).write()
    embedding.quantize(result.graph, config, note)
    embedding.warn_of_floats(result.graph, note)
    return result


def _remarks(context: Context) -> Note:
    def note(subject: str | None, text: str, *, doubt: bool = False) -> None:
        (context.warn if doubt else context.note)(STAGE, subject, text)

    return note


def fit(
    model: ir.Model,
    config: QuantConfig,
    samples: Iterable[Mapping[str, Array]],
    context: Context,
) -> tuple[ir.Model, Rounding]:
    """``apply`` up to the last stage: the float copy, and what rounding it needs.

    The copy's channels may be equalised; its nodes and values are those of the ``Rounding``.
    """
    from edgepipe.quantization import (
        calibration,
        dense,
        equalization,
        nncf_ptq,
        smoothquant,
        sweep,
    )
    from edgepipe.quantization.executor import Rounding
    from edgepipe.quantization.graph import check_filled
    from edgepipe.quantization.placement import place

    check_filled(model.graph)
    note = _remarks(context)
    result = model.clone()
    graph = result.graph
    inputs = calibration.collect(graph, samples, config, note)
    if "smoothquant" in config.methods:
        smoothquant.smooth(graph, inputs, note)
    if "equalization" in config.methods:
        equalization.equalize(graph, inputs, (config.weight_bits, config.activation_bits), note)
    if config.activation_bits is not None:
        dense.rewrite(graph, config, note)
    placement = place(graph, config, note)
    context.progress("observing ranges")
    rounding = Rounding(placement, calibration.ranges(graph, placement, inputs, config, note))
    if config.fit == "nncf":
        nncf_ptq.fit(result, rounding, inputs, config, note)
    else:
        sweep.fit(placement, rounding, inputs, config, note, context.progress)
    return result, rounding
