"""Where Q/DQ pairs go: which operators compute in integers, and which tensors share a scale.

1. Linear operators with constant weights (Conv, ConvTranspose, Gemm, MatMul) and products of two
   activations are integer unless an override says float.
2. Operators that integers pass through are integer where all their inputs are, and one of their
   readers is: movement (Reshape, Concat, MaxPool, …) keeps the scale; Add, Mul, averages, linear
   Resize and functions of one value have their own.
3. A linear operator takes the residual Add and the Relu or Clip behind it along: nothing is
   rounded in between. Averages and Adds take their Relu or Clip.
4. A tensor is quantized when an integer operator reads it. One that only float operators or the
   caller read comes unrounded from the accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from edgepipe.quantization.config import Format, QuantConfig
from edgepipe.quantization.graph import Array, bounds, constant, dims, dynamic, is_op, only_user
from edgepipe.quantization.remarks import Note

MOVEMENT = frozenset(
    [
        "Reshape",
        "Flatten",
        "Transpose",
        "Slice",
        "Squeeze",
        "Unsqueeze",
        "Split",
        "Concat",
        "Pad",
        "MaxPool",
        "Identity",
        "Expand",
        "Tile",
        "DepthToSpace",
        "SpaceToDepth",
        "Gather",
        "Resize",
    ]
)
AVERAGES = frozenset(("AveragePool", "GlobalAveragePool", "ReduceMean"))
BINARY = frozenset(("Add", "Sub", "Mul"))
#: Functions of one value: a table of all codes.
TABLES = frozenset(
    [
        "Relu",
        "Clip",
        "Sigmoid",
        "Tanh",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Elu",
        "Selu",
        "Softplus",
        "Softsign",
        "Mish",
        "Gelu",
        "Erf",
        "Abs",
        "Neg",
        "Sqrt",
        "Exp",
    ]
)
#: A last layer with more of all weights than this gets no 8 bits: a classifier is a third of some
#: networks, and 4 bits are chosen for their size. With groups, which lose less, the first neither
#: (an embedding).
LARGE_SHARE, LARGE_SHARE_GROUPED = 0.2, 0.05
#: Movement operators that take several data inputs.
ALL_INPUTS = frozenset(("Concat",))


@dataclass(frozen=True, eq=False)
class Unit:
    """Nodes computed together; only the outputs of the last are seen by others.

    ``linear`` is the node with the weights, if any. ``integer`` tells the arithmetic.
    """

    nodes: tuple[ir.Node, ...]
    integer: bool
    linear: ir.Node | None = None

    @property
    def residual(self) -> ir.Value | None:
        """The other operand of a fused residual Add."""
        for before, node in zip(self.nodes, self.nodes[1:], strict=False):
            if is_op(node, "Add"):
                return next(v for v in node.inputs if v is not None and v is not before.outputs[0])
        return None


@dataclass
class Placement:
    """The result: units in order, and the group of every quantized tensor.

    Tensors of one group share scale and zero point. ``bits`` is by group. ``formats`` has every
    integer node, and the weight-only ones.
    """

    units: list[Unit]
    group: dict[ir.Value, int]
    bits: dict[int, int]
    formats: dict[ir.Node, Format]
    integer: set[ir.Node] = field(default_factory=set)

    def reads_codes(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether ``node`` sees ``value`` rounded to its grid."""
        producer = value.producer()
        return value in self.group and (producer in self.integer or node in self.integer)


def weight_of(node: ir.Node) -> ir.Value | None:
    """The constant float weight of a linear operator that can be quantized, or None."""
    if not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    weight = node.inputs[1]
    array = constant(weight)
    if array is None or array.dtype != np.float32 or not dynamic(node.inputs[0]):
        return None
    if node.op_type == "MatMul" and array.ndim != 2:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        held, width = constant(bias), output_channels(node, array)
        if held is None or held.size != width:
            return None
    if node.op_type == "Gemm" and (
        node.attributes.get_float("alpha", 1.0) != 1.0
        or node.attributes.get_float("beta", 1.0) != 1.0
        or node.attributes.get_int("transA", 0) != 0
    ):
        return None
    return weight


def output_channels(node: ir.Node, weight: Array) -> int:
    """Number of output channels of a linear operator with this weight."""
    if node.op_type == "ConvTranspose":
        return int(weight.shape[1]) * node.attributes.get_int("group", 1)
    if node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)
    ):
        return int(weight.shape[1])
    return int(weight.shape[0])


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The float tensors a node computes on, as far as they are not constant."""
    several = node.op_type in BINARY | ALL_INPUTS | {"MatMul"}
    values = node.inputs if several else node.inputs[:1]
    return [value for value in values if value is not None and dynamic(value)]


def place(graph: ir.Graph, config: QuantConfig, note: Note) -> Placement:
    """Decide for every node and tensor of a canonical float graph."""
    formats = _formats(graph, config, note)
    if config.activation_bits is None:
        units = [Unit((n,), False, n if n in formats and weight_of(n) else None) for n in graph]
        kept = {n: f for n, f in formats.items() if weight_of(n) is not None}
        return Placement(units, {}, {}, kept)
    integer = _integer_nodes(graph, formats, note)
    formats = {n: f for n, f in formats.items() if n in integer}
    units = _units(graph, integer, config)
    integer |= {node for unit in units if unit.integer for node in unit.nodes}
    internal = {v for unit in units for node in unit.nodes[:-1] for v in node.outputs}
    quantized = _quantized(graph, integer, internal, config)
    group = _groups(graph, integer, quantized)
    bits: dict[int, int] = {}
    for value, number in group.items():
        producer = value.producer()
        own = formats.get(producer) if producer is not None else None
        # What comes from outside or from float operators keeps 8 bits: it costs no weights.
        wanted = own.activation_bits if own and own.activation_bits else 8
        bits[number] = max(bits.get(number, 0), wanted)
    return Placement(units, group, bits, formats, integer)


def _formats(graph: ir.Graph, config: QuantConfig, note: Note) -> dict[ir.Node, Format]:
    formats, free = {}, set()
    for node in graph:
        name = node.name or ""
        format = config.format_of(name, node.op_type)
        if format is None:
            note(node.name, "kept float by an override")
        else:
            formats[node] = format
        if config.override_of(name, node.op_type) is None:
            free.add(node)
    weighted = {node: weight for node in graph if (weight := weight_of(node)) is not None}
    if weighted and config.first_last != "same":
        ends = list(weighted)
        large = LARGE_SHARE if config.group_size is None else LARGE_SHARE_GROUPED
        for node in {ends[0], ends[-1]} & free:
            if config.first_last == "float":
                del formats[node]
                note(node.name, "kept float: first or last layer")
            elif (
                formats[node].weight_bits < 8
                and (node is ends[-1] or config.group_size is not None)
                and _share(node, weighted) > large
            ):
                note(node.name, "first or last layer, but with the bits of the others: it is large")
            elif formats[node].weight_bits < 8:
                # All codes: kernels are exact with them too, only slower, and the first layer's
                # accuracy is worth it.
                formats[node] = replace(formats[node], weight_bits=8, weight_limit=127)
    if config.depthwise == "w8":
        for node in free & formats.keys():
            if node in weighted and _is_depthwise(node, weighted[node]):
                formats[node] = replace(formats[node], weight_bits=8)
    return formats


def _is_depthwise(node: ir.Node, weight: ir.Value) -> bool:
    """Whether every input channel has filters of its own."""
    shape, groups = dims(weight), node.attributes.get_int("group", 1)
    return node.op_type == "Conv" and groups > 1 and shape is not None and shape[1] == 1


def _share(node: ir.Node, weighted: dict[ir.Node, ir.Value]) -> float:
    """How much of all weights ``node`` has."""
    sizes = {n: float(np.prod(dims(w) or ())) for n, w in weighted.items()}
    return sizes[node] / max(sum(sizes.values()), 1.0)


def _integer_nodes(graph: ir.Graph, formats: dict[ir.Node, Format], note: Note) -> set[ir.Node]:
    integer: set[ir.Node] = set()
    for node in graph:
        format = formats.get(node)
        if format is None or format.activation_bits is None or node.domain != "":
            continue
        if _computes(node):
            integer.add(node)
        elif reason := _stays_float(node, integer):
            note(node.name, f"{node.op_type} computes in float: {reason}")
        else:
            integer.add(node)
    for node in reversed(list(graph)):
        # Movement and tables in front of float operators would round for nothing.
        if node in integer and node.op_type in MOVEMENT | TABLES and not _computes(node):
            readers = {use.node for value in node.outputs for use in value.uses()}
            if not readers & integer:
                integer.discard(node)
    return integer


def _computes(node: ir.Node) -> bool:
    if node.op_type == "MatMul" and constant(node.inputs[1]) is None:
        return len(data_inputs(node)) == 2
    return weight_of(node) is not None


def _stays_float(node: ir.Node, integer: set[ir.Node]) -> str | None:
    """Why an operator that integers could pass through does not let them; None when it does."""
    kind = node.op_type
    if kind not in MOVEMENT | AVERAGES | BINARY | TABLES:
        return "it has no integer form"
    data = data_inputs(node)
    if not data or any(dims(value) is None for value in [*data, *node.outputs]):
        return "its shapes or inputs are not static float tensors"
    if kind in BINARY and len(data) < 2:
        return "one operand is constant"
    if kind == "Clip" and bounds(node) is None:
        return "its bounds are computed"
    if kind == "MaxPool" and len(node.outputs) > 1:
        return "its indices are read"
    if kind == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        if fill is not None and constant(fill) is None:
            return "its fill value is computed"
    if kind == "Resize" and node.attributes.get_string("mode", "nearest") == "cubic":
        return "cubic interpolation overshoots"
    for value in data:
        producer = value.producer()
        if producer is not None and producer not in integer:
            return f"its input '{value.name}' is float"
    return None


def _units(graph: ir.Graph, integer: set[ir.Node], config: QuantConfig) -> list[Unit]:
    chain_of: dict[ir.Node, tuple[ir.Node, ...]] = {}
    claimed: set[ir.Node] = set()
    # Backwards: of two convolutions that meet in an Add, the later one takes it.
    for node in reversed(list(graph)):
        if node not in integer or node in claimed:
            continue
        chain = [node]
        if weight_of(node) is not None and config.fuse_residual:
            add = only_user(node.outputs[0])
            if _takes_residual(node, add, integer, claimed):
                assert add is not None
                chain.append(add)
        if weight_of(node) is not None or node.op_type in AVERAGES | BINARY | {"MatMul"}:
            after = only_user(chain[-1].outputs[0])
            if after is not None and after in integer | _clips(after) and bounds(after) is not None:
                chain.append(after)
        claimed.update(chain[1:])
        chain_of[node] = tuple(chain)
    followers = {n: chain[0] for chain in chain_of.values() for n in chain[1:]}
    heads = {n for n in chain_of if n not in followers}
    units = []
    for node in graph:
        head = followers.get(node, node)
        chain_nodes = chain_of[head] if head in heads else (node,)
        if chain_nodes[-1] is node:
            linear = head if weight_of(head) is not None and head in integer else None
            units.append(Unit(chain_nodes, node in integer or head in integer, linear))
    return units


def _clips(node: ir.Node) -> set[ir.Node]:
    """A Relu at the end of the graph is no integer operator of its own, but still fuses."""
    return {node} if bounds(node) is not None else set()


def _takes_residual(
    node: ir.Node, add: ir.Node | None, integer: set[ir.Node], claimed: set[ir.Node]
) -> bool:
    if add is None or not is_op(add, "Add") or add not in integer or add in claimed:
        return False
    shapes = {dims(value) for value in [*data_inputs(add), *add.outputs]}
    return len(shapes) == 1 and add.inputs[0] is not add.inputs[1]


def _quantized(
    graph: ir.Graph, integer: set[ir.Node], internal: set[ir.Value], config: QuantConfig
) -> list[ir.Value]:
    found: dict[ir.Value, None] = {}
    for node in graph:
        if node not in integer:
            continue
        for value in data_inputs(node):
            if value not in internal:
                found[value] = None
        if config.quantize_outputs:
            found.update({v: None for v in node.outputs if dynamic(v) and v not in internal})
    return list(found)


def _groups(
    graph: ir.Graph, integer: set[ir.Node], quantized: list[ir.Value]
) -> dict[ir.Value, int]:
    number = {value: index for index, value in enumerate(quantized)}
    parent = list(range(len(quantized)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for node in graph:
        if node in integer and node.op_type in MOVEMENT and not _interpolates(node):
            members = [v for v in [*data_inputs(node), *node.outputs] if v in number]
            for other in members[1:]:
                first, second = sorted((root(number[members[0]]), root(number[other])))
                parent[second] = first
    return {value: root(index) for value, index in number.items()}


def _interpolates(node: ir.Node) -> bool:
    return is_op(node, "Resize") and node.attributes.get_string("mode", "nearest") != "nearest"
