"""New names and constants in an onnx_ir graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.graph import Array


class Names:
    """The names that a graph uses, and new ones."""

    def __init__(self, graph: ir.Graph) -> None:
        self._taken: set[str | None] = {*graph.initializers, *(v.name for v in graph.inputs)}
        self._taken |= {v.name for n in graph.all_nodes() for v in n.outputs}
        self._taken |= {n.name for n in graph.all_nodes()}

    def fresh(self, hint: str) -> str:
        """``hint``, with a number where it is taken."""
        name, count = hint, 0
        while name in self._taken:
            count += 1
            name = f"{hint}_{count}"
        self._taken.add(name)
        return name


def initializer(
    graph: ir.Graph, array: Array, name: str, dtype: ir.DataType | None = None
) -> ir.Value:
    """A constant of ``graph`` under a name that is not taken; ``dtype`` where NumPy has none."""
    if dtype is None:
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    else:
        tensor = ir.tensor(np.asarray(array, dtype.numpy()), dtype=dtype, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value
