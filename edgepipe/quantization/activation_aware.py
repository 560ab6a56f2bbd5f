"""Fits that look behind the Relu or Clip which follows a layer.

What the activation cuts off anyway need not be fitted. A solver is asked again with an aim that
leaves such outputs where they are (majorisation of the error behind the activation); per output
channel, the better result behind the activation stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgepipe.quantization.gptq import Solution
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array
from edgepipe.quantization.scales import CodeRange

#: How often the aim is renewed.
REFITS = 1

#: (weight [groups, outputs, K], moments, codes, which weights are kept) → codes, scales and bias.
Solver = Callable[[Array, Gram, CodeRange, Array | None], Solution]


@dataclass(frozen=True)
class Rows:
    """What a layer sees and should give: ``x`` [groups, rows, K], the sum that its activation
    reads ``wanted`` [groups, rows, outputs], and what is added to the layer's output on the way
    (``added``, the quantized residual, or None). The activation keeps ``low`` … ``high``."""

    x: Array
    wanted: Array
    added: Array | None
    low: float
    high: float

    def attainable(self, output: Array) -> Array:
        """The layer output to aim at, given the present one.

        Where the activation cuts the wanted value off, anything beyond the bound is as good: the
        present output stays the aim if it is beyond too.
        """
        total = output if self.added is None else output + self.added
        aim = np.where(self.wanted <= self.low, np.minimum(total, self.low), self.wanted)
        aim = np.where(self.wanted >= self.high, np.maximum(total, self.high), aim)
        return aim if self.added is None else aim - self.added

    def error(self, output: Array) -> Array:
        """Squared error behind the activation, summed over rows [groups, outputs], float64."""
        total = output if self.added is None else output + self.added
        difference = np.clip(total, self.low, self.high) - np.clip(self.wanted, self.low, self.high)
        result: Array = np.einsum("gro,gro->go", difference, difference, dtype=np.float64)
        return result

    def output(self, solution: Solution) -> Array:
        """What the layer gives with these weights [groups, rows, outputs]."""
        codes, scale, bias = solution
        product = self.x @ (codes * scale).astype(np.float32).transpose(0, 2, 1)
        result: Array = product + bias[:, None, :].astype(np.float32)
        return result


def solve(
    solver: Solver,
    weight: Array,
    gram: Gram,
    span: CodeRange,
    rows: Rows,
    kept: Array | None = None,
) -> Solution:
    """``solver`` at the linear output, then behind the activation. ``gram`` is of ``rows``."""
    best = solver(weight, gram, span, kept)
    output = rows.output(best)
    error = rows.error(output)
    for _ in range(REFITS):
        aim = gram.with_outputs(rows.x, rows.attainable(output))
        found = solver(weight, aim, span, kept)
        new = rows.error(rows.output(found))
        better = new < error
        if not better.any():
            break
        error = np.where(better, new, error)
        best = (
            np.where(better[..., None], found[0], best[0]),
            np.where(better[..., None], found[1], best[1]),
            np.where(better, found[2], best[2]),
        )
        output = rows.output(best)
    return best
