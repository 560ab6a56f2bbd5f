"""The sparsity stage of the pipeline: recipe and data become zeros in the float graph, or a smaller
graph.

Files: ``layers`` (one layer's weights), ``walk`` (moments of all, in one pass), ``coupling``,
``channel_rules`` and ``channels`` (whole channels), ``amounts`` and ``cost`` (how much of which),
``distillation`` (training without labels).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgepipe import quantize
from edgepipe.context import Context
from edgepipe.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.importer.source import Source
    from edgepipe.quantize import Calibration

STAGE = "sparsity"
#: Samples that weights are refitted to.
MOST_SAMPLES = 512
Samples = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Pruned:
    """``reference`` is the pruned model as an ONNX file: what the bundle must compute. ``manifest``
    has, per layer, the share of zeros or the channels, and the multiplications left."""

    reference: bytes
    manifest: dict[str, Any]


def run(
    graph: ir.Model, source: Source, calibration: Calibration | None, context: Context
) -> tuple[ir.Model, Pruned | None]:
    """A pruned copy of ``graph`` as the recipe asks; ``graph`` itself where it asks for nothing.

    Every convolution of one group is pruned but those that read the model's input; large dense
    layers of one row too, and by blocks those of many rows; by channels, whatever makes some that
    can go (``coupling``). With ``calibration`` the weights that stay are fitted layer by layer to
    what the dense network computes, and trained further towards it where the recipe says so. Raises
    UserError where nothing can be pruned, for data that do not fit and where there are none to
    train on.
    """
    pattern = context.recipe.sparsity
    if pattern is None:
        return graph, None
    result = graph.clone()
    samples, epochs = None, context.recipe.settings.distill
    if calibration is None and epochs:
        raise UserError(
            "there is no data to train on", where="recipe file, distill", fix="give --calibration"
        )
    if calibration is None:
        context.warn(STAGE, "calibration", "no data given: weights are pruned, none is refitted")
    else:
        samples = _samples(source, graph, calibration, context)
    facts: dict[str, Any] = {"pattern": str(pattern), "refitted": samples is not None}
    prune = _channels if pattern.channels else _weights
    facts |= prune(result, graph, samples, context)
    if samples is not None and epochs:
        from edgepipe.prune import distillation

        result = distillation.run(result, graph, samples, epochs, context)
        facts["distilled"] = epochs
    return result, Pruned(quantize.onnx_bytes(result), facts)


def _samples(
    source: Source, graph: ir.Model, calibration: Calibration, context: Context
) -> Samples:
    from edgepipe.prune import walk
    from edgepipe.quantization.graph import check_filled

    check_filled(graph.graph)
    most = walk.affordable(graph.graph, MOST_SAMPLES)
    opened = quantize.open_samples(source, graph, calibration)
    if most < MOST_SAMPLES:
        context.note(STAGE, "calibration", f"{most} samples: more do not fit into memory")
    return [dict(s) for _, s in zip(range(most), opened, strict=False)]


def _weights(
    model: ir.Model, dense: ir.Model, samples: Samples | None, context: Context
) -> dict[str, Any]:
    """Zeros in the layers of ``model``; what the manifest says of them."""
    from edgepipe.prune import amounts, walk
    from edgepipe.prune import layers as single
    from edgepipe.quantization.layers import Layer, prunable

    pattern = context.recipe.sparsity
    assert pattern is not None
    layers = prunable(model.graph, pattern)
    if not layers:
        raise UserError(
            "no layer of the network can be pruned",
            where=f"--recipe {context.recipe}",
            fix="sparse kernels run convolutions of one group behind the first, and large dense "
            f"layers of one row; use {context.recipe.format}",
        )
    patterns = amounts.patterns(model, layers, samples, context)
    zeros, macs, names = {}, {}, {}
    walked = (
        ((node, None) for node in layers)
        if samples is None
        else walk.moments(dense.graph, model.graph, layers, samples)
    )
    for number, (node, gram) in enumerate(walked, 1):
        context.progress(f"pruning layer {number} of {len(layers)}")
        name = node.name or f"{node.op_type}_{number}"
        names[name] = node
        stays = single.kept(Layer.of(node), patterns[node], gram)
        zeros[name] = single.set_weight(node, stays, gram)
        macs[name] = single.macs(node)
    before = _macs(dense)
    left = before - round(sum(macs[name] * zeros[name] for name in macs))
    chosen = {}
    if len(set(patterns.values())) > 1 or pattern.auto:
        chosen["patterns"] = {
            name: str(p) if (p := patterns[node]) != amounts.DENSE else "dense"
            for name, node in names.items()
        }
    return {**chosen, "zeros": zeros, "macs": {"dense": before, "left": left}}


def _channels(
    model: ir.Model, dense: ir.Model, samples: Samples | None, context: Context
) -> dict[str, Any]:
    """Fewer channels in ``model``; what the manifest says of them."""
    from edgepipe.prune import channels
    from edgepipe.prune.channel_rules import couple

    pattern = context.recipe.sparsity
    assert pattern is not None
    coupling = couple(model.graph)
    if not coupling.families():
        reasons = {r for _, ids in coupling.makers for i in coupling.roots(ids)
                   if (r := coupling.reason(int(i)))}  # fmt: skip
        told = f" ({'; '.join(sorted(reasons)[:3])})" if reasons else ""
        raise UserError(
            f"no channel of the network can be removed{told}",
            where=f"--recipe {context.recipe}",
            fix="prune weights, for example with fp32+2:4v8, or use " + context.recipe.format,
        )
    context.progress("choosing channels")
    removal = channels.choose(model, coupling, pattern.percent, samples)
    for node, ids in coupling.makers:
        reason = coupling.reason(int(coupling.roots(ids)[0]))
        if reason is not None:
            context.note(STAGE, node.name, f"its channels stay: {reason}")
    if samples is not None:
        context.progress("refitting what stays")
        channels.refit(model, dense, removal, samples)
    channels.shrink(model.graph, removal)
    counts = {name: list(pair) for name, pair in removal.channels.items()}
    return {"zeros": {}, "channels": counts, "macs": {"dense": _macs(dense), "left": _macs(model)}}


def _macs(model: ir.Model) -> int:
    """Multiplications of all linear operators with constant weights."""
    from edgepipe.prune import layers as single
    from edgepipe.quantization.placement import weight_of

    return sum(single.macs(node) for node in model.graph if weight_of(node) is not None)
