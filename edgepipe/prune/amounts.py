"""The pattern of every layer, by the recipe's ``amounts`` and ``budget``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.prune import cost, walk
from edgepipe.prune.layers import kept
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.layers import Layer
from edgepipe.sparsity import amounts, pruning
from edgepipe.sparsity.pattern import Pattern

STAGE = "sparsity.amounts"
#: Per cent of zeros that a search may give a layer.
GRID = (0.0, 20.0, 35.0, 50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)
#: Output channels of a layer that distortion is measured on.
CHANNELS = 8


def patterns(
    model: ir.Model, layers: Sequence[ir.Node], samples: Sequence[Any] | None, context: Context
) -> dict[ir.Node, Pattern]:
    """The recipe's pattern for every layer of ``model``, the amounts of ``S%`` by layer.

    Raises UserError for amounts without data and budgets that cannot be met.
    """
    recipe = context.recipe
    pattern, way = recipe.sparsity, recipe.settings.amounts or "uniform"
    assert pattern is not None
    if way == "uniform":
        return dict.fromkeys(layers, pattern)
    if way == "erk":
        shapes = [Layer.of(node).weight_shape for node in layers]
        percents = amounts.erk(shapes, pattern.percent)
    else:
        percents = _search(model, layers, samples, pattern, context)
    for node, percent in zip(layers, percents, strict=True):
        context.note(STAGE, node.name, f"{percent:g} % of its weights are pruned")
    return {n: replace(pattern, percent=p) for n, p in zip(layers, percents, strict=True)}


def _search(
    model: ir.Model,
    layers: Sequence[ir.Node],
    samples: Sequence[Any] | None,
    pattern: Pattern,
    context: Context,
) -> list[float]:
    if samples is None:
        raise UserError(
            'amounts = "search" measures what pruning does to outputs',
            where=f"recipe {context.recipe}",
            fix='give --calibration, or use amounts = "erk"',
        )
    budget = context.recipe.settings.budget or "macs"
    options = [replace(pattern, percent=percent) for percent in sorted({*GRID, pattern.percent})]
    distortions, costs, wanted = [], [], 0.0
    for node, gram in walk.moments(model.graph, model.graph, layers, samples):
        context.progress(f"measuring what {node.name or node.op_type} loses")
        layer = Layer.of(node)
        masks = [kept(layer, option, gram) for option in options]
        distortions.append([_distortion(layer, mask, gram) for mask in masks])
        costs.append([cost.of(node, mask, budget, context.target) for mask in masks])
        wanted += cost.of(node, kept(layer, pattern, gram), budget, context.target)
    chosen = amounts.spend(distortions, costs, wanted)
    assert chosen is not None, "the amounts asked for are among the options"
    context.note(
        STAGE, f"budget {budget}",
        f"{wanted:,.0f} as by {pattern} everywhere; searched: "
        f"{sum(layer[o] for layer, o in zip(costs, chosen, strict=True)):,.0f}",
    )  # fmt: skip
    return [options[option].percent for option in chosen]


def _distortion(layer: Layer, stays: Any, gram: Gram) -> float:
    """Squared error of the refitted layer's output, as a share of the output's variance."""
    weight, hessian = layer.matrix(layer.weight)[0].astype(np.float64), gram.hessian[0]
    rows = np.unique(np.linspace(0, layer.outputs - 1, CHANNELS).astype(int))
    cross = weight[rows] @ hessian
    refitted = pruning.refit(weight[rows], stays[rows], hessian, cross).astype(np.float64)
    error = refitted - weight[rows]
    power = max(float(np.sum(cross * weight[rows])), 1e-30)
    return float(np.sum((error @ hessian) * error)) / power
