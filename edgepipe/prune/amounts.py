"""The pattern of every layer, by the recipe's ``amounts`` and ``budget``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.context import Context
from edgepipe.errors import UserError
from edgepipe.prune import cost, walk
from edgepipe.prune.layers import equations, scores
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.layers import Layer
from edgepipe.sparsity import amounts, pruning
from edgepipe.sparsity.pattern import LARGEST, Pattern
from edgepipe.target import Target

STAGE = "sparsity.amounts"
#: Per cent of zeros that a search may give a layer.
GRID = (0.0, 20.0, 35.0, 50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0)
#: N of M that ``auto`` tries, shared by the widths of the target's register tiles.
SHARED = ((4, 8), (2, 4), (1, 4), (1, 8))
DENSE = Pattern()
#: Output channels of a layer that distortion is measured on: bands, as wide as a register tile,
#: whose places are chosen, and those of their channels that are refitted.
BANDS, BAND, REFITTED = 2, 32, 8


def patterns(
    model: ir.Model, layers: Sequence[ir.Node], samples: Sequence[Any] | None, context: Context
) -> dict[ir.Node, Pattern]:
    """The pattern of every layer of ``model``: the recipe's, with its amounts, or of the target's.

    Raises UserError for searches without data and for time that cannot be saved.
    """
    recipe = context.recipe
    pattern, way = recipe.sparsity, recipe.settings.amounts or "uniform"
    assert pattern is not None
    if not pattern.auto and way == "uniform":
        return dict.fromkeys(layers, pattern)
    if way == "erk":
        shapes = [Layer.of(node).weight_shape for node in layers]
        percents = amounts.erk(shapes, pattern.percent)
        found = {n: replace(pattern, percent=p) for n, p in zip(layers, percents, strict=True)}
    elif samples is None:
        raise UserError(
            "a search measures what pruning does to outputs",
            where=f"recipe {recipe}",
            fix='give --calibration, or use amounts = "erk"',
        )
    else:
        found = _search(model, layers, samples, context)
    for node, chosen in found.items():
        context.note(STAGE, node.name, f"pattern {chosen}" if chosen != DENSE else "stays dense")
    return found


@dataclass(frozen=True)
class Option:
    """What a layer loses, as a share of its output's variance, and costs with a pattern."""

    pattern: Pattern
    distortion: float
    cost: float


def _search(
    model: ir.Model, layers: Sequence[ir.Node], samples: Sequence[Any], context: Context
) -> dict[ir.Node, Pattern]:
    pattern = context.recipe.sparsity
    assert pattern is not None
    budget = "latency" if pattern.auto else context.recipe.settings.budget or "macs"
    if budget == "latency" and context.target.kind == "cuda":
        raise UserError(
            "GPUs have no sparse kernels, so zeros save no time there",
            where=f"recipe {context.recipe} on {context.target.name}",
            fix="remove channels, for example with fp32+c40%",
        )
    found: list[list[Option]] = []
    for node, gram in walk.moments(model.graph, model.graph, layers, samples):
        context.progress(f"measuring what {node.name or node.op_type} loses")
        measured, options = _Measured(Layer.of(node), gram), []
        for tried in _tried(node, pattern, context.target):
            price = cost.of(node, measured.largest(tried), budget, context.target)
            options.append(Option(tried, measured.distortion(tried), price))
        found.append(options)
    wanted = sum(_allowed(options, pattern) for options in found)
    chosen = amounts.spend(
        [[o.distortion for o in options] for options in found],
        [[o.cost for o in options] for options in found],
        wanted,
    )
    if chosen is None:
        least = sum(min(o.cost for o in options) for options in found)
        whole = sum(options[0].cost for options in found)
        raise UserError(
            f"{pattern.percent:g} % of the time cannot be saved by zeros",
            where=f"recipe {context.recipe} on {context.target.name}",
            fix=f"by estimate {100 * (1 - least / whole):.0f} % can at most; ask for less",
        )
    taken = [options[number] for options, number in zip(found, chosen, strict=True)]
    total = sum(option.cost for option in taken)
    context.note(STAGE, f"budget {budget}", f"{wanted:,.0f}; chosen: {total:,.0f}")
    for node, options, option in zip(layers, found, taken, strict=True):
        context.note(STAGE, node.name, _reason(options, option))
    return {node: option.pattern for node, option in zip(layers, taken, strict=True)}


def _tried(node: ir.Node, pattern: Pattern, target: Target) -> list[Pattern]:
    """The dense layer first."""
    if not pattern.auto:
        return [replace(pattern, percent=p) for p in sorted({*GRID, pattern.percent})]
    shared = [
        Pattern(kept=n, of=m, shared=v)
        for v in cost.shared_widths(node, target)
        for n, m in SHARED
        if v <= LARGEST
    ]
    return [DENSE, *(Pattern(percent=p) for p in GRID if p), *shared]


def _allowed(options: Sequence[Option], pattern: Pattern) -> float:
    """What a layer would cost if all were alike."""
    if pattern.auto:
        return options[0].cost * (1 - pattern.percent / 100)
    return next(o.cost for o in options if o.pattern == pattern)


def _reason(options: Sequence[Option], chosen: Option) -> str:
    """Why ``chosen``: the best other option that is as fast."""
    said = f"{chosen.cost / options[0].cost:.2f} of the dense cost, distortion {_db(chosen)}"
    others = [o for o in options if o.pattern != chosen.pattern and o.cost <= chosen.cost]
    if not others:
        return said + "; nothing costs less"
    other = min(others, key=lambda o: o.distortion)
    return f"{said}; the best that costs no more is {other.pattern}: {_db(other)}"


def _db(option: Option) -> str:
    return f"{100 * option.distortion:.2g} %"


class _Measured:
    """What patterns do to a layer, by some of its outputs."""

    def __init__(self, layer: Layer, gram: Gram) -> None:
        self.scores = scores(layer, gram)
        self.weight = layer.matrix(layer.weight)[0]
        self.hessian, self.cross = equations(layer, gram)
        self.spectrum = pruning.Spectrum(self.hessian)
        bands = np.unique(np.linspace(0, -(-layer.outputs // BAND) - 1, BANDS).astype(int))
        places = (bands[:, None] * BAND + np.arange(BAND)).reshape(-1)
        #: Outputs whose places are chosen together, and some of those, whose weights are refitted.
        self.rows = places[places < layer.outputs]
        self.some = np.unique(np.linspace(0, len(self.rows) - 1, REFITTED).astype(int))

    def largest(self, pattern: Pattern) -> Any:
        """What stays of the whole layer, bool [outputs, K], by the worth of each weight."""
        return pruning.mask(self.scores, pattern).reshape(self.weight.shape)

    def distortion(self, pattern: Pattern) -> float:
        """Squared error of the refitted layer's output, as a share of the output's variance."""
        rows, some = self.rows, self.rows[self.some]
        stays = pruning.mask(self.scores[rows], pattern)
        if pattern != DENSE:
            stays = pruning.settled(
                stays, pattern, self.weight[rows], self.hessian, self.cross[rows], self.spectrum
            )
        weight, stays = self.weight[some].astype(np.float64), stays.reshape(len(rows), -1)
        wanted = weight @ self.hessian
        refitted = pruning.refit(self.weight[some], stays[self.some], self.hessian, wanted)
        error = refitted.astype(np.float64) - weight
        power = max(float(np.sum(wanted * weight)), 1e-30)
        return float(np.sum((error @ self.hessian) * error)) / power
