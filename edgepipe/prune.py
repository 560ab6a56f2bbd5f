"""The sparsity stage of the pipeline: recipe and data become zeros in the float graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe import quantize
from edgepipe.context import Context
from edgepipe.errors import UserError

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgepipe.importer.source import Source
    from edgepipe.quantize import Calibration

STAGE = "sparsity"
#: Samples that weights are refitted to, and rows of each that enter the moments of a layer.
MOST_SAMPLES = 128
ROWS = 256


@dataclass(frozen=True)
class Pruned:
    """``reference`` is the pruned model as an ONNX file: what the bundle must compute. ``manifest``
    has, per layer, the share of zeros."""

    reference: bytes
    manifest: dict[str, Any]


def run(
    graph: ir.Model, source: Source, calibration: Calibration | None, context: Context
) -> tuple[ir.Model, Pruned | None]:
    """A pruned copy of ``graph`` as the recipe asks; ``graph`` itself where it asks for nothing.

    Every convolution of one group is pruned but those that read the model's input; by blocks, dense
    layers of many rows too. With
    ``calibration`` the weights that stay are fitted layer by layer to what the dense network
    computes (see ``edgepipe.sparsity.pruning``). Raises UserError where nothing can be pruned and
    for data that do not fit.
    """
    from edgepipe.quantization.layers import prunable

    pattern = context.recipe.sparsity
    if pattern is None:
        return graph, None
    result = graph.clone()
    layers = prunable(result.graph, blocks=pattern.block > 1)
    if not layers:
        raise UserError(
            "no convolution of the network can be pruned",
            where=f"--recipe {context.recipe}",
            fix="sparse kernels run convolutions of one group behind the first; use "
            + context.recipe.format,
        )
    samples: list[Mapping[str, Any]] | None = None
    if calibration is None:
        context.warn(STAGE, "calibration", "no data given: weights are pruned, none is refitted")
    else:
        opened = quantize.open_samples(source, graph, calibration)
        samples = [dict(s) for _, s in zip(range(MOST_SAMPLES), opened, strict=False)]
    zeros = {}
    for number, node in enumerate(layers, 1):
        context.progress(f"pruning layer {number} of {len(layers)}")
        zeros[node.name or f"{node.op_type}_{number}"] = _prune(
            result, graph, node, samples, context
        )
    facts = {"pattern": str(pattern), "refitted": samples is not None, "zeros": zeros}
    return result, Pruned(quantize.onnx_bytes(result), facts)


def _prune(
    model: ir.Model,
    dense: ir.Model,
    node: ir.Node,
    samples: list[Mapping[str, Any]] | None,
    context: Context,
) -> float:
    """Prune ``node`` of ``model``; returns the share of zeros it has then."""
    from edgepipe.quantization.layers import Layer
    from edgepipe.sparsity import pruning

    pattern, layer = context.recipe.sparsity, Layer.of(node)
    assert pattern is not None
    weight = layer.matrix(layer.weight)[0]
    if not np.isfinite(weight).all():
        raise UserError("its weights are not finite", where=f"{node.op_type} '{node.name}'")
    scores, gram = weight.astype(np.float64) ** 2, None
    if samples is not None:
        gram = _moments(model, dense, layer, samples)
        scores = scores * (np.diagonal(gram.hessian[0]) + gram.mean_x[0] ** 2)
    taps = int(np.prod(layer.weight_shape[2:]))
    kept = pruning.mask(scores.reshape(layer.outputs, -1, taps), pattern).reshape(weight.shape)
    result = np.where(kept, weight, np.float32(0))
    if gram is not None:
        hessian, cross, mean_x = gram.hessian[0], gram.cross[0], gram.mean_x[0]
        if node.op_type == "MatMul":  # without a bias the means are the weights' to fit
            hessian = hessian + np.outer(mean_x, mean_x)
            cross = cross + np.outer(gram.mean_y[0], mean_x)
        result = pruning.refit(weight, kept, hessian, cross)
        if node.op_type != "MatMul":
            bias = gram.mean_y[0] - result.astype(np.float64) @ mean_x
            _replace(model, node, 2, bias.astype(np.float32))
    _replace(model, node, 1, layer.restore(result))
    return round(1 - float(np.count_nonzero(result)) / result.size, 4)


def _moments(model: ir.Model, dense: ir.Model, layer: Any, samples: Any) -> Any:
    """Of the layer's input in the pruned network and its output in the dense one."""
    from edgepipe.quantization.gram import Gram

    node = layer.node
    inputs = _session(model, node.inputs[0].name)
    outputs = _session(dense, node.outputs[0].name)
    columns = int(np.prod(layer.weight_shape)) // layer.outputs
    gram, random = Gram(1, layer.outputs, columns), np.random.default_rng(0)
    for sample in samples:
        (x,), (y,) = inputs.run(None, sample), outputs.run(None, sample)
        pixels = int(np.prod(y.shape[2:] if node.op_type == "Conv" else y.shape[:-1]))
        rows = np.sort(random.permutation(pixels)[:ROWS])
        gram.add(layer.patches(x, rows), layer.rows(y, rows))
    return gram


def _session(model: ir.Model, name: str | None) -> Any:
    """ONNX Runtime up to the value ``name``."""
    from edgepipe.onnx_session import open_session

    part = model.clone()
    values = [v for n in part.graph for v in n.outputs] + list(part.graph.inputs)
    part.graph.outputs[:] = [next(v for v in values if v.name == name)]
    return open_session(quantize.onnx_bytes(part))


def _replace(model: ir.Model, node: ir.Node, index: int, array: Any) -> None:
    """Give ``node`` an initializer of its own with ``array``, in the dtype of its weights, as input
    ``index``."""
    import onnx_ir as ir

    dtype = node.inputs[1].dtype if node.inputs[1] is not None else None
    dtype = ir.DataType.FLOAT if dtype is None else dtype
    array = array.astype(dtype.numpy())
    taken = set(model.graph.initializers) | {v.name for n in model.graph for v in n.outputs}
    name = f"{node.outputs[0].name}/{'bias' if index == 2 else 'pruned'}"
    while name in taken:
        name += "_"
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(dtype),
        const_value=ir.tensor(array, name=name),
    )
    model.graph.register_initializer(value)
    old = node.inputs[index] if index < len(node.inputs) else None
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    if old is not None and old.name and not old.uses() and old.is_initializer():
        del model.graph.initializers[old.name]
