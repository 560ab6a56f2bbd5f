"""A random graph with its inputs, what every value of it must be, and how far rounding moves it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# The makers register themselves.
from tests.random_graphs import elementwise, movement, reductions, windows  # noqa: F401
from tests.random_graphs.builder import IR_VERSION, LARGEST, Array, Builder, Value, deviation
from tests.random_graphs.makers import MAKERS

#: Kinds of graphs and how often each comes.
KINDS = {"image": 5, "sequence": 2, "any": 2, "integer": 1}
#: Proposals that are to become nodes of a graph.
PROPOSALS = (2, 10)


@dataclass(frozen=True)
class Expected:
    """An output: its value, and how far from it another order of rounding may end up."""

    array: Array
    deviation: float


@dataclass(frozen=True)
class Case:
    """A model, its inputs by name, and what ONNX Runtime gives, node by node, for its outputs."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, Array]
    outputs: dict[str, Expected]


def random_graph(seed: int) -> tuple[Case, Builder]:
    """The graph of ``seed``: the same with the same versions of numpy, onnx and ONNX Runtime."""
    builder = Builder(seed)
    kind = builder.rng.choices(list(KINDS), list(KINDS.values()))[0]
    for _ in range(builder.rng.choice([1, 1, 2])):
        while (array := _input(builder, kind)).size > LARGEST:
            pass  # nothing would take it
        builder.input(array)
    wanted = builder.rng.randint(*PROPOSALS)
    if kind == "image" and builder.rng.random() < 0.7:
        for _ in range(2):  # only what lies behind the first convolution is pruned
            builder.attempt(windows.conv)
    for _ in range(10 * wanted):
        builder.attempt(builder.rng.choice(MAKERS[kind]))
        if len(builder.nodes) >= wanted:
            break
    while not builder.nodes:
        builder.attempt(builder.rng.choice(MAKERS[kind]))
    return finish(builder, f"{kind}-{seed}"), builder


def _input(g: Builder, kind: str) -> Array:
    side = [1, 2, 3, 4, 5, 7, 8, 9, 11, 13]
    batch, channels = g.rng.choice([1, 1, 1, 2, 3]), g.rng.choice([1, 2, 3, 4, 7, 8, 16, 17])
    if kind == "image":
        shape = [batch, channels, g.rng.choice(side), g.rng.choice(side)]
    elif kind == "sequence":
        width = [1, 3, 4, 8, 15, 16]
        shape = [batch, g.rng.choice(side), g.rng.choice(width)][g.rng.choice([0, 0, 1]) :]
    else:
        shape = [g.rng.choice([1, 2, 3, 4, 5, 7, 9]) for _ in range(g.rng.randint(0, 4))]
    dtype: Any = np.float32
    if kind == "integer":
        dtype = g.rng.choice([np.int32, np.int64, np.uint8, np.int8, np.float32, np.bool_])
    elif g.rng.random() < 0.03:
        dtype = np.float16
    return g.contents(shape, dtype)


def finish(builder: Builder, name: str) -> Case:
    """Name the outputs: what nobody reads, but for a few dead ends, and some that are read too."""
    rng = builder.rng
    read = {i for node in builder.nodes for i in node.input}
    made = [v for v in builder.values if v not in builder.inputs]
    outputs = [v for v in made if v.name not in read and rng.random() < 0.9]
    outputs += [v for v in made if v.name in read and rng.random() < 0.1]
    outputs = outputs or made[-1:]
    rng.shuffle(outputs)
    as_nodes = {v.name for v in builder.constants if rng.random() < 0.1}
    return assemble(builder, name, outputs, as_nodes)


def assemble(builder: Builder, name: str, outputs: list[Value], as_nodes: set[str]) -> Case:
    """The graph of all nodes; constants in ``as_nodes`` are nodes, the others initializers."""
    read = {i for node in builder.nodes for i in node.input}
    used = [v for v in builder.constants if v.name in read]
    nodes = [
        helper.make_node("Constant", [], [v.name], value=numpy_helper.from_array(v.array))
        for v in used
        if v.name in as_nodes
    ]
    graph = helper.make_graph(
        nodes + builder.nodes,
        name,
        [_info(v) for v in builder.inputs],
        [_info(v) for v in outputs],
        [numpy_helper.from_array(v.array, v.name) for v in used if v.name not in as_nodes],
    )
    opset = [helper.make_opsetid("", builder.opset)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return Case(
        name,
        model,
        {v.name: v.array for v in builder.inputs},
        {v.name: Expected(v.array, deviation(v)) for v in outputs},
    )


def _info(value: Value) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(value.name, kind, value.shape)


def main() -> None:
    """Print which operators the first graphs have, and why proposals are rejected."""
    operators: Counter[str] = Counter()
    rejected: Counter[tuple[str, str]] = Counter()
    for seed in range(300):
        case, builder = random_graph(seed)
        operators.update(node.op_type for node in case.model.graph.node)
        rejected.update((maker, reason[:150]) for maker, reason in builder.rejected)
    print(len(operators), operators)
    for (maker, reason), count in rejected.most_common(60):
        print(count, maker, reason)


if __name__ == "__main__":
    main()
