"""What a pass edits a graph with: unique names, shared constants, shapes known after every edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

#: The ai.onnx version every model has after the first pass. All later passes and the lowering
#: are written against it: newer operators are decomposed, older forms rewritten.
OPSET = 23

Array = np.ndarray[Any, np.dtype[Any]]


class Editor:
    """One model being rewritten in place. Not shared between threads.

    ``note(subject, reason)`` records why something was not done. ``infer`` is called with every
    node that is created or changed, so that output shapes and dtypes are known at once.
    """

    def __init__(
        self,
        model: ir.Model,
        note: Callable[[str | None, str], None] = lambda subject, reason: None,
    ) -> None:
        self.model = model
        self.note = note
        #: Called by the folding sweep with every node before it is looked at.
        self.before_visit: Callable[[ir.Node], object] | None = None
        #: Nodes added since the sweep last looked; it folds and infers them next.
        self.inserted: list[ir.Node] = []
        self._names: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """Learn the names in the model again, after something else edited it."""
        for graph in self.model.graphs():
            self._names.update(v.name for v in graph.inputs if v.name)
            self._names.update(graph.initializers)
            for node in graph:
                self._names.update(v.name for v in node.outputs if v.name)
                if node.name:
                    self._names.add(node.name)

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """Every node of these types (all types when none is given), subgraphs included.

        Nodes removed while iterating are skipped.
        """
        for graph in list(self.model.graphs()):
            for node in list(graph):
                if node.graph is not None and (not op_types or is_op(node, *op_types)):
                    yield node

    def fresh(self, hint: str) -> str:
        """A name no value or node of the model has, starting with ``hint``."""
        name, count = hint, 0
        while name in self._names or not name:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def constant(self, array: Array, hint: str = "constant") -> ir.Value:
        """A new initializer of the main graph holding ``array`` (not copied)."""
        name = self.fresh(hint)
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        return self.initializer(tensor, name)

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        """A new initializer of the main graph holding ``tensor``; ``name`` must be fresh."""
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.model.graph.register_initializer(value)
        return value

    def insert(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
    ) -> ir.Value:
        """Add a node in front of ``before`` and return its first output, shape inferred."""
        return self.insert_node(before, op_type, inputs, attributes, outputs=outputs).outputs[0]

    def insert_node(
        self,
        before: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int = 1,
    ) -> ir.Node:
        """Like ``insert`` but returns the node (for more than one output)."""
        stem = before.outputs[0].name or before.op_type if before.outputs else before.op_type
        node = ir.node(op_type, inputs, attributes or {}, num_outputs=outputs)
        node.name = self.fresh(f"{stem}/{op_type}")
        for value in node.outputs:
            value.name = self.fresh(f"{stem}/{op_type}")
        node.version = OPSET
        owner(before).insert_before(before, node)
        self.infer(node)
        self.inserted.append(node)
        return node

    def become(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Turn ``node`` into another operator with the same outputs (names, shapes, users)."""
        node.op_type, node.domain, node.version = op_type, "", OPSET
        node.attributes.clear()
        for attribute in ir.convenience.convert_attributes(dict(attributes or {})):
            node.attributes.add(attribute)
        self.set_inputs(node, inputs)

    @staticmethod
    def set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
        """Replace all inputs of ``node``."""
        node.resize_inputs(len(inputs))
        for index, value in enumerate(inputs):
            node.replace_input_with(index, value)

    def forward(self, old: ir.Value, new: ir.Value) -> None:
        """Let every user of ``old`` read ``new``; graph outputs keep their names.

        An Identity is left where a graph output would become an input, a constant, a value of
        another graph or a second name of the same value: ONNX needs a node there.
        """
        producer = old.producer()
        if old.is_graph_output():
            graph = owner(producer) if producer is not None else self.model.graph
            source = new.producer()
            if source is None or source.graph is not graph or new.is_graph_output():
                if producer is not None and is_op(producer, "Identity"):
                    producer.replace_input_with(0, new)
                    _redirect(old, new)
                    return
                assert producer is not None
                keep = ir.node("Identity", [new], name=self.fresh("output"))
                keep.outputs[0].shape = new.shape if new.shape is not None else old.shape
                keep.outputs[0].type = new.type if new.type is not None else old.type
                graph.insert_after(producer, keep)
                name = old.name
                old.name = self.fresh(f"{name}/replaced")
                keep.outputs[0].name = name
                self._swap_output(graph, old, keep.outputs[0])
                _redirect(old, new)
                return
            name = old.name
            old.name = self.fresh(f"{name}/replaced")
            new.name = name
            self._swap_output(graph, old, new)
        _redirect(old, new)

    @staticmethod
    def _swap_output(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
        for index, output in enumerate(list(graph.outputs)):
            if output is old:
                graph.outputs[index] = new

    def remove(self, node: ir.Node) -> None:
        """Delete a node nobody uses any more."""
        owner(node).remove(node, safe=True)

    def infer(self, node: ir.Node) -> None:
        """Fill in shape and dtype of the node's outputs from its inputs."""
        from edgepipe.passes import shapes

        shapes.infer_node(node)


def _redirect(old: ir.Value, new: ir.Value) -> None:
    for user, index in tuple(old.uses()):
        if user is not new.producer():
            user.replace_input_with(index, new)


def owner(node: ir.Node) -> ir.Graph:
    """The graph a node is in."""
    assert node.graph is not None, f"{node.name} is in no graph"
    return node.graph


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether ``node`` is one of these standard operators."""
    return node is not None and node.domain == "" and node.op_type in op_types


def array_of(value: ir.Value | None) -> Array | None:
    """The NumPy array of a constant, or None. Read-only by agreement: weights are shared."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def scalar_of(value: ir.Value | None) -> float | None:
    """The number held by a constant with one element, or None."""
    array = array_of(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The static shape, or None where the rank or any dimension is unknown."""
    if value is None or value.shape is None:
        return None
    dims = tuple(value.shape)
    return tuple(int(d) for d in dims) if all(isinstance(d, int) for d in dims) else None  # type: ignore[arg-type]


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads ``value``, or None if others read it or it is an output."""
    users = {user for user, _ in value.uses()}
    return next(iter(users)) if len(users) == 1 and not value.is_graph_output() else None
