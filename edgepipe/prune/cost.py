"""What a layer costs with some of its weights: multiplications, bytes or, by estimate, time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.prune.layers import macs
from edgepipe.quantization.graph import Array
from edgepipe.quantization.layers import Layer
from edgepipe.target import Target


def of(node: ir.Node, stays: Array, budget: str, target: Target) -> float:
    """``stays``, bool [outputs, K], are the weights that are left. ``budget``: "macs", "bytes" of
    values alone, or "latency": the vector instructions of the target's cheapest float32 kernel,
    dense ones included, from the same table that the compiler chooses by."""
    if budget == "latency":
        return min(instructions(node, stays, target).values())
    share = float(np.count_nonzero(stays)) / stays.size
    return share * (macs(node) if budget == "macs" else 4 * stays.size)


def instructions(node: ir.Node, stays: Array, target: Target) -> dict[str, int]:
    """The estimate of each form of a layer with weights at ``stays``."""
    from edgepipe.lowering import sparsity  # imports tvm
    from edgepipe.lowering.groups import Group

    source = node.inputs[0]
    assert source is not None
    weight = Layer.of(node).restore(stays.astype(np.float32))
    convolution = node.op_type == "Conv"
    kind = "conv" if convolution else "matmul"
    group = Group(kind, [node], [source], node.outputs[0], blocked=convolution)
    return sparsity.estimates(group, weight, target)[0]


def shared_widths(node: ir.Node, target: Target) -> list[int]:
    """Output channels that may share a pattern in the kernels of ``target``: of convolutions."""
    if node.op_type != "Conv":
        return []
    from edgepipe.kernels import sparse_shared  # imports tvm

    return sparse_shared.widths(target, Layer.of(node).outputs)
