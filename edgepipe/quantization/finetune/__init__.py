"""Fine-tuning on the training data of a network: rounded as its Q/DQ graph rounds, or in float.

``run`` starts from the canonical graph, so networks that exist only as ONNX files can be trained,
and torch modules take the same way through the importer. BatchNorms are folded by then
(Krishnamoorthi 2018, arXiv 1806.08342, 3.2: what is trained is what is executed); in float they can
come back while it lasts. Files: ``operators`` (graph operators as torch functions),
``fake_quantize`` (grids), ``layer`` and ``network`` (the torch module), ``masks`` (sparsity),
``normalization``, ``examples``, ``training``, ``checkpoint``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.finetune.settings import FinetuneSettings

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.quantization.graph import Array

__all__ = ["FinetuneSettings", "run"]

STAGE = "finetune"


def run(
    model: ir.Model,
    config: QuantConfig | None,
    data: tuple[Mapping[str, Array] | Array, Array | None],
    settings: FinetuneSettings,
    context: Context,
    teacher: ir.Model | None = None,
) -> ir.Model:
    """Train a copy of ``model``, the result of ``edgepipe.passes.run``, and return it.

    With ``config`` the copy is quantized as ``quantization.apply`` does, then trained as it will
    be executed; the result is a standard Q/DQ graph. With None it stays float.
    ``data``: inputs by name, [N, …] for model inputs [1, …] (or the only input's array), and
    labels, [N] classes or [N, …] wanted outputs, None under ``distillation=1``. The first
    ``config.max_samples`` calibrate.
    ``teacher``: the float network that ``settings.distillation`` compares with; ``model`` itself
    by default. Raises UserError for data, settings and checkpoints that do not fit, and
    Unsupported for operators that cannot be trained.
    """
    _require_torch()
    from edgepipe.quantization.finetune import result
    from edgepipe.quantization.finetune.checkpoint import Checkpoint
    from edgepipe.quantization.finetune.examples import Examples
    from edgepipe.quantization.finetune.network import Network, check_batch
    from edgepipe.quantization.finetune.training import train

    if config is not None and config.activation_bits is None:
        raise UserError(
            "weight-only quantization is not fine-tuned", where="finetune", fix="use w8a8 or w4a8"
        )
    if config is not None and settings.normalization != "none":
        raise UserError("what is trained in integers is not normalized", where="normalization",
                        fix="train in float first, then quantize")  # fmt: skip
    check_batch(model.graph)
    examples = Examples.of(model.graph, *data, settings)
    # Refuses operators before calibration takes its time.
    teaching = Network(model.graph, None)
    if teacher is not None:
        _check_teacher(model.graph, teacher.graph)
        teaching = Network(teacher.graph, None)
    checkpoint = None
    if settings.checkpoint is not None:
        mark = result.fingerprint(model, teacher, config, examples, settings)
        checkpoint = Checkpoint(Path(settings.checkpoint), mark, settings.checkpoint_seconds)
    trained, network = result.begin(model, config, examples, settings, context)
    taught = settings.distillation > 0.0
    train(
        network,
        teaching.eval() if taught else None,
        examples,
        settings,
        checkpoint,
        context.progress,
    )
    result.write(trained, network)
    return trained


def _check_teacher(graph: ir.Graph, teacher: ir.Graph) -> None:
    for what in ("inputs", "outputs"):
        ours, theirs = (
            [(v.name, str(v.shape)) for v in getattr(g, what) if v.name not in g.initializers]
            for g in (graph, teacher)
        )
        if ours != theirs:
            raise UserError(f"its {what} are {theirs}, those of the model {ours}", where="teacher")


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise UserError(
            "torch is not installed", where="finetune", fix='pip install "edgepipe[torch]"'
        ) from None
