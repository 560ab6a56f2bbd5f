"""Rounding to a grid that gradients pass through: learned steps and moving averages.

The codes are those of ``observers.Grid``: nearest, ties to even, saturated, after a float32
division. Gradients go straight through the rounding of what lies inside the grid and stop
outside; the step of the grid has the gradient of Esser et al. 2020 (LSQ, arXiv 1902.08153). It
is trained as the logarithm of its ratio to the first one, as Jain et al. 2020 (TQT, arXiv
1903.08066) do: it stays positive, and steps of an optimiser are relative.
"""

# mypy: allow-subclassing-any, disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from edgepipe.quantization.observers import MOMENTUM, Grid, GridStyle
from edgepipe.quantization.scales import CodeRange
from edgepipe.quantization.weights import BIAS_LIMIT, LayerWeights

#: A weight starts this far, in steps, from the middle of the code that it was fitted to at most:
#: it keeps what it lost to rounding, but not a code that the fit did not choose.
NEAR = 0.49


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, x: torch.Tensor, step: torch.Tensor, low: int, high: int
    ) -> torch.Tensor:
        ratio = x / step
        context.save_for_backward(ratio, step)
        context.limits = low, high
        return ratio.clamp(low, high).round_().mul_(step)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        ratio, step = context.saved_tensors
        bounded = ratio.clamp(*context.limits)
        inside = bounded == ratio
        to_x = gradient * inside
        to_step = None
        if context.needs_input_grad[1]:
            error = bounded.round_().sub_(ratio * inside)
            to_step = (gradient * error).sum_to_size(step.shape)
        return to_x, to_step, None, None


def round_to_grid(x: torch.Tensor, step: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """``x`` at the nearest multiple of ``step`` from ``low`` to ``high`` of them.

    ``step`` is float32 and broadcasts over ``x``; both get gradients.
    """
    result: torch.Tensor = _Round.apply(x, step, low, high)
    return result


class ActivationGrid(nn.Module):
    """The grid of one tensor, or of several that share it.

    ``learned`` trains its step and keeps its zero point; otherwise the grid follows the moving
    averages of the smallest and largest value of each batch while the module trains.
    """

    def __init__(self, start: Grid, style: GridStyle, learned: bool) -> None:
        super().__init__()
        self.style, self.learned = style, learned
        self.low, self.high = start.low, start.high
        first, last = (
            (end - start.zero_point) * float(start.scale) for end in (start.low, start.high)
        )
        self.register_buffer("start", torch.tensor(start.scale))
        self.register_buffer("zero_point", torch.tensor(start.zero_point))
        self.register_buffer("extremes", torch.tensor([first, last], dtype=torch.float64))
        if learned:
            self.log_ratio = nn.Parameter(torch.zeros(()))

    @property
    def step(self) -> torch.Tensor:
        """The scale, float32 without dimensions."""
        return self.start * self.log_ratio.exp() if self.learned else self.start

    @property
    def grid(self) -> Grid:
        """What the graph is written with."""
        scale = np.float32(self.step.detach().numpy())
        return Grid(scale, int(self.zero_point), self.low, self.high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid."""
        if self.training and not self.learned:
            self._follow(x.detach())
        zero = int(self.zero_point)
        return round_to_grid(x, self.step, self.low - zero, self.high - zero)

    def _follow(self, x: torch.Tensor) -> None:
        seen = torch.stack(torch.aminmax(x)).double()
        self.extremes += MOMENTUM * (seen - self.extremes)
        grid = self.style.grid(*(float(e) for e in self.extremes))
        # A new tensor: another use of this grid may wait for its gradient with the old one.
        self.start = torch.tensor(grid.scale)
        self.zero_point.fill_(grid.zero_point)


class WeightGrid(nn.Module):
    """The grid of one layer's weights: a step per output channel, and the codes of its bias."""

    def __init__(self, start: LayerWeights, span: CodeRange, learned: bool) -> None:
        super().__init__()
        self.span, self.axis, self.learned = span, start.axis, learned
        shape = [1] * start.codes.ndim
        shape[start.axis] = -1
        self.register_buffer("start", torch.tensor(start.scale).reshape(shape))
        if learned:
            self.log_ratio = nn.Parameter(torch.zeros_like(self.start))

    @property
    def step(self) -> torch.Tensor:
        """The scales, float32, of the weight's rank."""
        return self.start * self.log_ratio.exp() if self.learned else self.start

    def near(self, weight: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """``weight`` moved as far as needed to have these codes (see NEAR)."""
        ratio = codes + (weight / self.start - codes).clamp(-NEAR, NEAR)
        return ratio.clamp(self.span.low, self.span.high) * self.start

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` on the grid."""
        return round_to_grid(weight, self.step, self.span.low, self.span.high)

    def bias_step(self, input_step: torch.Tensor, outputs: int) -> torch.Tensor:
        """Scales of the int32 bias [outputs]: input scale times weight scale."""
        flat = input_step * self.step.reshape(-1)
        return flat.repeat(outputs // flat.numel()).detach()


def round_bias(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``bias`` as int32 codes of ``step`` hold it; gradients go straight through."""
    return round_to_grid(bias, step, -BIAS_LIMIT, BIAS_LIMIT)
