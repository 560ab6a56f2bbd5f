"""Averages networks that were trained from one start, zeros included.

Weights of networks that were fine-tuned from the same one with other seeds or rates average to a
better one (Wortsman et al. 2022, arXiv 2203.05482). Sparse ones must share their zeros for the
result to be as sparse, so they start from a pruned network whose zeros are kept (Zimmer et al.
2023, arXiv 2306.16788).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError


def average(models: Sequence[ir.Model]) -> ir.Model:
    """A copy of the first model whose float32 initializers are the means of all, in float64.

    Raises UserError for models that are not the same but for these values, quantized ones among
    them, and for weights that are zero in some of them only.
    """
    if not models:
        raise UserError("no model was given", where="average")
    result = models[0].clone()
    structures = [_structure(m) for m in models]
    for number, structure in enumerate(structures[1:], 2):
        if structure != structures[0]:
            raise UserError(
                f"model {number} is another network than the first", where="average",
                fix="average networks that were fine-tuned from one float network",
            )  # fmt: skip
    for name, value in result.graph.initializers.items():
        arrays = [_array(m, name) for m in models]
        if arrays[0].dtype != np.float32:
            if any(not np.array_equal(a, arrays[0]) for a in arrays):
                raise UserError(
                    f"'{name}' is {arrays[0].dtype} and differs: codes have no average",
                    where="average", fix="average float networks, then quantize",
                )  # fmt: skip
            continue
        zeros = [a == 0 for a in arrays]
        if arrays[0].ndim > 1 and any(not np.array_equal(z, zeros[0]) for z in zeros):
            raise UserError(
                f"'{name}' has zeros in other places in some of the models", where="average",
                fix='train them from one sparse network with sparsity="kept"',
            )  # fmt: skip
        mean = np.mean(np.stack(arrays), axis=0, dtype=np.float64).astype(np.float32)
        value.const_value = ir.tensor(mean, name=name)
    return result


def _structure(model: ir.Model) -> list[Any]:
    """Everything but the values of the initializers."""
    nodes: list[Any] = [
        (
            n.domain, n.op_type, tuple(None if v is None else v.name for v in n.inputs),
            tuple(v.name for v in n.outputs), sorted((k, str(a)) for k, a in n.attributes.items()),
        )
        for n in model.graph
    ]  # fmt: skip
    shapes = sorted((k, str(v.shape), str(v.dtype)) for k, v in model.graph.initializers.items())
    return [nodes, shapes, [v.name for v in model.graph.outputs]]


def _array(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
