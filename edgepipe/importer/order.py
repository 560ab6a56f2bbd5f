"""Topological order of a graph's nodes, and what keeps it from having one."""

from __future__ import annotations

import heapq

import onnx

from edgepipe.errors import UserError


def order_nodes(graph: onnx.GraphProto, outer: frozenset[str], where: str) -> None:
    """Sort ``graph`` and its subgraphs topologically, in place and stably.

    ``outer`` are the names visible from enclosing graphs. Raises UserError for a cycle and for
    a name that nothing produces.
    """
    known = outer | {i.name for i in graph.input} | {t.name for t in graph.initializer}
    produced = {name for node in graph.node for name in node.output if name}
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for subgraph in inner:
                order_nodes(subgraph, frozenset(known | produced), where)
    needs = [_reads(node) - known for node in graph.node]
    for node, names in zip(graph.node, needs, strict=True):
        for name in sorted(names - produced):
            raise UserError(
                f"{node.op_type} reads '{name}', which nothing produces",
                where=f"{where}, node '{node.name or '?'}'",
                fix="export the model again",
            )
    for output in graph.output:
        if output.name not in produced and output.name not in known:
            raise UserError(f"output '{output.name}' is produced by nothing", where=where)
    order = _stable_order(graph, needs, where)
    if order != sorted(order):
        nodes = [graph.node[i] for i in order]
        copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def _stable_order(graph: onnx.GraphProto, needs: list[set[str]], where: str) -> list[int]:
    """Indices of ``graph.node`` in an order that writes before it reads."""
    producer = {name: i for i, n in enumerate(graph.node) for name in n.output if name}
    waiting = [{producer[name] for name in names} for names in needs]
    readers: dict[int, list[int]] = {}
    for i, sources in enumerate(waiting):
        for source in sources:
            readers.setdefault(source, []).append(i)
    ready = [i for i, sources in enumerate(waiting) if not sources]
    order: list[int] = []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for reader in readers.get(i, ()):
            waiting[reader].discard(i)
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(needs):
        stuck = next(i for i, sources in enumerate(waiting) if sources)
        node = graph.node[stuck]
        raise UserError(
            f"the graph has a cycle through {node.op_type} '{node.name or node.output[0]}'",
            where=where,
            fix="export the model again",
        )
    return order


def _reads(node: onnx.NodeProto) -> set[str]:
    """Names ``node`` reads, those its subgraphs take from outside included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        inner = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for graph in inner:
            own = {i.name for i in graph.input} | {t.name for t in graph.initializer}
            own |= {name for n in graph.node for name in n.output}
            read = {o.name for o in graph.output}.union(*(_reads(n) for n in graph.node))
            names |= read - own
    return names
