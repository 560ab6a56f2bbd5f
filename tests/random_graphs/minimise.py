"""Makes a graph that fails small: parts are left out as long as the same trial fails the same way.

1. All outputs but one; nodes that nothing reads any more go.
2. A node becomes an input of the graph that holds what the node computed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tests.random_graphs.builder import Builder, RejectedError, Value
from tests.random_graphs.generate import Case, assemble, random_graph
from tests.random_graphs.trial import Trials

Fails = Callable[[Case], bool]


def status_of(case: Case, recipe: str, target: str) -> str:
    """The verdict on one graph by itself."""
    trials = Trials()
    trial = trials.compile(case, recipe, target)
    trials.link()
    return trials.judge(trial).status


def minimise(case: Case, fails: Fails) -> Case:
    """The smallest graph found that still fails."""
    for name in list(case.outputs):
        smaller = _rebuilt(case, [name], set())
        if smaller is not None and fails(smaller):
            case = smaller
            break
    done: set[str] = set()
    while waiting := [n for n in case.model.graph.node if n.output[0] not in done]:
        node = waiting[0]
        done.add(node.output[0])
        if set(node.output) & case.outputs.keys():
            continue
        smaller = _rebuilt(case, list(case.outputs), {name for name in node.output if name})
        if smaller is not None and fails(smaller):
            case = smaller
    return case


def _rebuilt(case: Case, outputs: list[str], cut: set[str]) -> Case | None:
    """``case`` with these outputs alone, values in ``cut`` being inputs; None where it cannot be
    judged any more."""
    graph = case.model.graph
    needed = _needed(graph, outputs, cut)
    builder = Builder(0)
    builder.opset = case.model.opset_import[0].version
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    known = {n: Value(n, a, a, constant=True) for n, a in values.items()}
    builder.constants = list(known.values())
    for name, array in case.inputs.items():
        known[name] = Value(name, array, array)
    try:
        computed = {
            name: value for node in graph.node for name, value in _run(builder, node, known)
        }
    except RejectedError:
        return None
    builder.inputs = [known[n] for n in case.inputs if n in needed]
    builder.inputs += [Value(n, computed[n].array, computed[n].array) for n in sorted(cut & needed)]
    builder.nodes = [n for n in builder.nodes if needed & set(n.output) - cut]
    return assemble(builder, case.name, [computed[n] for n in outputs], set())


def _run(
    builder: Builder, node: onnx.NodeProto, known: dict[str, Value]
) -> list[tuple[str, Value]]:
    made = builder.append(node, {n: known[n] for n in node.input if n})
    known |= {value.name: value for value in made}
    return [(value.name, value) for value in made]


def _needed(graph: onnx.GraphProto, outputs: list[str], cut: set[str]) -> set[str]:
    """Names that ``outputs`` follow from, up to those in ``cut``."""
    needed = set(outputs)
    for node in reversed(graph.node):
        if needed & set(node.output) - cut:
            needed |= set(node.input)
    return needed


def save_minimised(seed: int, recipe: str, target: str, folder: Path) -> str:
    """Minimise the graph of ``seed`` and save it; returns what was saved."""
    case = random_graph(seed)[0]
    status = status_of(case, recipe, target)
    if status not in ("wrong", "crashed"):
        return f"{status} by itself"
    case = minimise(case, lambda c: status_of(c, recipe, target) == status)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{case.name}-{recipe.replace(':', '')}-{target}"
    onnx.save(case.model, stem.with_suffix(".onnx"))
    np.savez(stem.with_suffix(".npz"), **case.inputs)
    nodes = ", ".join(node.op_type for node in case.model.graph.node)
    return f"{stem.with_suffix('.onnx')} and .npz: {nodes}"
