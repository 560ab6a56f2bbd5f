"""A canonical graph as a torch module: in float, or rounded where its Q/DQ graph rounds."""

# mypy: allow-subclassing-any
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edgepipe.errors import Unsupported
from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.executor import Rounding
from edgepipe.quantization.finetune.fake_quantize import ActivationGrid
from edgepipe.quantization.finetune.layer import TrainedLayer
from edgepipe.quantization.finetune.operators import function_of
from edgepipe.quantization.graph import constant, name_of
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.observers import GridStyle
from edgepipe.quantization.placement import MOVEMENT, weight_of

#: Movement that may write a value which is not among those it reads, or mix scales.
_WRITES = frozenset(("Pad", "Resize", "Concat"))


@dataclass(frozen=True)
class Start:
    """What a rounded network begins with: a fitted ``Rounding`` and how it came to be."""

    rounding: Rounding
    config: QuantConfig
    learned: bool


@dataclass(frozen=True)
class _Step:
    node: ir.Node
    function: Callable[..., object]
    layer: TrainedLayer | None
    #: Inputs that are seen rounded.
    rounded: frozenset[int] = field(default_factory=frozenset)


class Network(nn.Module):
    """The graph over batches [N, …]; weights of linear operators are trained, all else stays.

    With ``start`` every tensor is rounded where ``placement`` says so, weights to the codes and
    biases to the int32 of the Q/DQ graph: ``forward`` computes what that graph computes, but for
    the order of float sums. Raises Unsupported for operators that cannot be fine-tuned.
    """

    def __init__(self, graph: ir.Graph, start: Start | None) -> None:
        super().__init__()
        self.graph, self.start = graph, start
        self.constants: dict[ir.Value, torch.Tensor] = {}
        self.layers = nn.ModuleList()
        self.grids = nn.ModuleDict()
        if start is not None:
            self._add_grids(start)
        self.steps = [self._step(node) for node in graph]

    def _add_grids(self, start: Start) -> None:
        bits, config = start.rounding.placement.bits, start.config
        for number in sorted(set(start.rounding.placement.group.values())):
            style = GridStyle(bits[number], config.signed_activations, config.symmetric_activations)
            grid = ActivationGrid(start.rounding.grids[number], style, start.learned)
            self.grids[str(number)] = grid

    def _step(self, node: ir.Node) -> _Step:
        layer, start = None, self.start
        if weight_of(node) is not None:
            weights = span = None
            if start is not None and node in start.rounding.weights:
                weights = start.rounding.weights[node]
                span = start.rounding.placement.formats[node].span
            layer = TrainedLayer(Layer.of(node), weights, span, start is None or start.learned)
            self.layers.append(layer)
        for value in node.inputs[: 1 if layer is not None else None]:
            array = constant(value)
            if value is not None and array is not None and value not in self.constants:
                self.constants[value] = torch.tensor(array)
        rounded = frozenset(
            index
            for index, value in enumerate(node.inputs)
            if value is not None
            and start is not None
            and start.rounding.placement.reads_codes(node, value)
        )
        return _Step(node, function_of(node), layer, rounded)

    def grid(self, value: ir.Value) -> ActivationGrid | None:
        """The grid of a quantized tensor; None for one that stays float."""
        group = {} if self.start is None else self.start.rounding.placement.group
        found: ActivationGrid | None = self.grids[str(group[value])] if value in group else None
        return found

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Input name → [N, …] float32; the outputs [N, …] in the graph's order."""
        values = {v: inputs[name_of(v)] for v in self.graph.inputs if v.name in inputs}
        self.trace(values)
        return [values[v] for v in self.graph.outputs]

    def trace(self, values: dict[ir.Value, torch.Tensor]) -> dict[ir.Value, torch.Tensor]:
        """Add every computed value to ``values``; returns those that were rounded, rounded."""
        rounded: dict[ir.Value, torch.Tensor] = {}

        def see(value: ir.Value, on_grid: bool) -> torch.Tensor:
            if value not in values:
                return self.constants[value]
            if not on_grid:
                return values[value]
            if value not in rounded:
                rounded[value] = self._round(value, values[value])
            return rounded[value]

        for step in self.steps:
            given = [
                None if value is None else see(value, index in step.rounded)
                for index, value in enumerate(step.node.inputs[: 1 if step.layer else None])
            ]
            if step.layer is not None:
                source = step.node.inputs[0]
                grid = self.grid(source) if source is not None and 0 in step.rounded else None
                given += step.layer(None if grid is None else grid.step)
            found = step.function(*given)
            if step.layer is not None and step.layer.norm is not None:
                found = step.layer.norm(found)
            outputs = found if isinstance(found, list) else [found]
            values.update(zip(step.node.outputs, outputs, strict=False))
        placement = None if self.start is None else self.start.rounding.placement
        for value in self.graph.outputs:
            # An integer operator's output leaves rounded if it is quantized at all.
            if placement and value in placement.group and value.producer() in placement.integer:
                values[value] = see(value, True)
        return rounded

    def _round(self, value: ir.Value, x: torch.Tensor) -> torch.Tensor:
        grid, producer = self.grid(value), value.producer()
        assert grid is not None and self.start is not None
        if (
            producer in self.start.rounding.placement.integer
            and producer.op_type in MOVEMENT - _WRITES
            and self.grid(producer.inputs[0]) is grid  # type: ignore[arg-type]
        ):
            return x  # moved codes are codes
        rounded: torch.Tensor = grid(x)
        return rounded


def check_batch(graph: ir.Graph) -> None:
    """Refuse inputs that do not hold one sample along their leading dimension."""
    for value in graph.inputs:
        shape = value.shape
        if value.name not in graph.initializers and (
            shape is None or len(shape) == 0 or shape[0] != 1
        ):
            raise Unsupported(
                "fine-tuning needs inputs with a leading dimension of 1 for samples",
                where=f"input '{value.name}'",
                fix="import the model with a batch of 1",
            )


def tensor(array: np.ndarray) -> torch.Tensor:
    """Images with their channels innermost: convolutions are up to a third faster."""
    found = torch.from_numpy(array)
    return found.contiguous(memory_format=torch.channels_last) if array.ndim == 4 else found


def as_float32(array: torch.Tensor) -> np.ndarray:
    """A copy of a parameter outside of torch."""
    result: np.ndarray = array.detach().numpy().astype(np.float32, copy=True)
    return result
