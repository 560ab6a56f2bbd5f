"""The trained weights of one linear operator, as they are computed with."""

# mypy: allow-subclassing-any, disable-error-code="untyped-decorator"
from __future__ import annotations

import numpy as np
import torch
from torch import nn

from edgepipe.quantization.finetune.fake_quantize import WeightGrid, round_bias
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.scales import CodeRange
from edgepipe.quantization.weights import LayerWeights


class TrainedLayer(nn.Module):
    """``weight`` in ONNX layout and ``bias`` [outputs] (None for a float MatMul), both float32.

    Without ``start`` they are those of the graph and stay float; with it they begin at the
    fitted codes and are rounded. Everything that reads the weights goes through ``weight``: a
    parametrisation registered there (``torch.nn.utils.parametrize``) acts on training and result.
    """

    def __init__(
        self, layer: Layer, start: LayerWeights | None, span: CodeRange | None, learned: bool
    ) -> None:
        super().__init__()
        self.layer = layer
        weight, bias = torch.tensor(layer.weight), torch.tensor(layer.bias)
        self.grid = None
        if start is not None and span is not None:
            self.grid = WeightGrid(start, span, learned)
            weight = self.grid.near(weight, torch.tensor(start.codes, dtype=torch.float32))
            bias = torch.tensor(start.bias)
        self.weight = nn.Parameter(weight)
        plain = layer.node.op_type == "MatMul" and start is None
        self.bias = None if plain else nn.Parameter(bias)
        #: What its outputs are normalized by while it is trained (see ``normalization``).
        self.norm: nn.Module | None = None

    def forward(self, input_step: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias; ``input_step`` is the scale of the rounded input, if it is one."""
        if self.grid is None or input_step is None:
            return self.weight, self.bias
        bias = self.bias
        if bias is not None:
            bias = round_bias(bias, self.grid.bias_step(input_step, self.layer.outputs))
        return self.grid(self.weight), bias

    @torch.no_grad()
    def result(self, input_step: torch.Tensor) -> LayerWeights:
        """Codes, scales and bias of a rounded layer, as ``QdqWriter`` takes them."""
        assert self.grid is not None
        weight, bias = self(input_step)
        codes = torch.round(weight / self.grid.step).numpy().astype(np.int8)
        scale = self.grid.step.reshape(-1).numpy().copy()
        held: dict[str, np.ndarray] = {"bias": np.zeros(self.layer.outputs, np.float32)}
        if bias is not None:
            step = self.grid.bias_step(input_step, self.layer.outputs)
            held = {
                "bias": bias.numpy().copy(),
                "bias_codes": torch.round(bias / step).numpy().astype(np.int32),
                "bias_scale": step.numpy().copy(),
            }
        return LayerWeights(codes, scale, self.grid.span.bits, self.layer.axis, None, **held)
