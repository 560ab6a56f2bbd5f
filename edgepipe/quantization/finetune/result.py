"""From the graph to the network that is trained, and from the trained network to the graph."""

from __future__ import annotations

import hashlib
from dataclasses import fields

import numpy as np
import onnx_ir as ir

from edgepipe import quantization
from edgepipe.context import Context
from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.executor import Rounding
from edgepipe.quantization.finetune.examples import Examples
from edgepipe.quantization.finetune.layer import TrainedLayer
from edgepipe.quantization.finetune.network import Network, Start, as_float32
from edgepipe.quantization.finetune.settings import FinetuneSettings
from edgepipe.quantization.graph import Array, constant, name_of
from edgepipe.quantization.qdq import QdqWriter


def begin(
    model: ir.Model,
    config: QuantConfig | None,
    examples: Examples,
    settings: FinetuneSettings,
    context: Context,
) -> tuple[ir.Model, Network]:
    """A copy of ``model`` and its network, rounded as fitted without training if ``config``."""
    if config is None:
        copy = model.clone()
        return copy, Network(copy.graph, None)
    copy, rounding = quantization.fit(model, config, examples.samples(), context)
    learned = settings.ranges == "learned"
    return copy, Network(copy.graph, Start(rounding, config, learned))


def write(model: ir.Model, network: Network) -> None:
    """Write trained weights into ``model``, whose graph ``network`` was made of, and Q/DQ pairs."""
    for layer in network.layers:
        if layer.grid is None:
            _write_float(model.graph, layer)
    if network.start is not None:
        QdqWriter(model.graph, rounding_of(network, network.start.rounding)).write()


def rounding_of(network: Network, start: Rounding) -> Rounding:
    """Grids and weights as they are now."""
    grids = {int(number): grid.grid for number, grid in network.grids.items()}
    found = Rounding(start.placement, grids)
    for layer in network.layers:
        if layer.grid is not None:
            grid = network.grid(layer.layer.node.inputs[0])
            assert grid is not None, "integer layers read rounded tensors"
            found.weights[layer.layer.node] = layer.result(grid.step)
    return found


def _write_float(graph: ir.Graph, layer: TrainedLayer) -> None:
    """Weights of its own for a float layer: another that shared the old ones keeps them."""
    node = layer.layer.node
    _replace(graph, node, 1, as_float32(layer.weight))
    if layer.bias is not None:
        bias = as_float32(layer.bias)
        had = len(node.inputs) > 2 and node.inputs[2] is not None
        if had or bias.any():
            node.resize_inputs(max(3, len(node.inputs)))
            _replace(graph, node, 2, bias)


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: Array) -> None:
    old = node.inputs[index]
    shape = array.shape if old is None else np.asarray(constant(old)).shape
    hint = f"{node.name}/bias" if old is None else name_of(old)
    taken = {*graph.initializers, *(v.name for n in graph for v in n.outputs)}
    taken |= {v.name for v in graph.inputs}
    shared = old is not None and (len(tuple(old.uses())) > 1 or old.is_graph_output())
    if old is not None and not shared:
        old.const_value = ir.tensor(array.reshape(shape), name=old.name)
        return
    name, count = hint, 0
    while name in taken:
        count += 1
        name = f"{hint}_{count}"
    tensor = ir.tensor(array.reshape(shape), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    node.replace_input_with(index, value)


def fingerprint(
    model: ir.Model,
    teacher: ir.Model | None,
    config: QuantConfig | None,
    examples: Examples,
    settings: FinetuneSettings,
) -> str:
    """What a training depends on, as a hash."""
    found = hashlib.sha256()
    for part in (model, teacher):
        if part is not None:
            found.update(ir.serde.serialize_model(part).SerializeToString(deterministic=True))
    for array in [*examples.inputs.values(), examples.labels]:
        if array is not None:
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(array.tobytes())
    names = [f.name for f in fields(settings) if not f.name.startswith("checkpoint")]
    chosen = {name: getattr(settings, name) for name in names}
    found.update(f"{config!r} {chosen!r}".encode())
    return found.hexdigest()
