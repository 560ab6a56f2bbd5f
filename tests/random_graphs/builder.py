"""Builds random ONNX graphs node by node, each evaluated by ONNX Runtime when it is added.

A maker proposes a node; what ONNX Runtime refuses, what is not finite and what amplifies rounding
is rejected. So makers need no arithmetic of shapes, and every value of the graph has its reference
and its tolerance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]

OPSETS = (8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
IR_VERSION = 10
#: Elements of the largest tensor, and its largest magnitude.
LARGEST, STEEPEST = 3000, 1e4
#: What rounding may do to a node's output, relative to its largest element.
ROUNDING = {np.dtype(np.float32): 1e-6, np.dtype(np.float16): 2e-3}
#: Rounding amplified beyond this share of the largest element: nothing could be judged.
AMPLIFIED = {np.dtype(np.float32): 1e-3, np.dtype(np.float16): 5e-2}
#: Operators of floats that round nothing.
EXACT = {
    "Abs", "ArgMax", "ArgMin", "Ceil", "Clip", "Concat", "DepthToSpace", "Dropout", "Expand",
    "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "Identity",
    "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin", "Relu", "Reshape",
    "ReverseSequence", "Round", "ScatterElements", "ScatterND", "Shape", "Sign", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze",
    "Where", "CenterCropPad", "Scatter",
}  # fmt: skip


class RejectedError(Exception):
    """The proposal is no node that could be judged."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor with what ONNX Runtime computes, and the same from slightly shaken values."""

    name: str
    array: Array
    shaken: Array
    constant: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.array.dtype

    @property
    def is_float(self) -> bool:
        return self.array.dtype.kind == "f"


class Builder:
    """One graph. ``rng`` decides structure, ``numbers`` makes contents."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.opset = self.rng.choice(OPSETS)
        self.inputs: list[Value] = []
        self.constants: list[Value] = []
        self.values: list[Value] = []
        self.nodes: list[onnx.NodeProto] = []
        self.rejected: list[tuple[str, str]] = []
        #: Elements of a value, at most.
        self.largest = LARGEST

    def input(self, array: Array) -> Value:
        """A new input of the graph that holds ``array``."""
        value = Value(f"x{len(self.inputs)}", array, array)
        self.inputs.append(value)
        self.values.append(value)
        return value

    def constant(self, array: Any, dtype: Any = None) -> Value:
        """An initializer; now and then one that is there with the same contents."""
        held = np.ascontiguousarray(np.asarray(array, dtype))
        held = held.reshape(np.shape(array))
        for other in self.constants:
            same = other.dtype == held.dtype and other.shape == held.shape
            if same and np.array_equal(other.array, held) and self.rng.random() < 0.5:
                return other
        value = Value(f"c{len(self.constants)}", held, held, constant=True)
        self.constants.append(value)
        return value

    def normal(self, *shape: int, dtype: Any = np.float32, fan_in: int = 2) -> Value:
        """Normal weights of variance 2 / ``fan_in`` (He et al. 2015)."""
        array = self.numbers.standard_normal(shape) * np.sqrt(2 / max(fan_in, 1))
        return self.constant(array.astype(dtype))

    def integers(self, values: Any) -> Value:
        """An int64 tensor: axes, sizes, indices."""
        return self.constant(np.asarray(values, np.int64))

    def pick(self, kinds: str = "f", least: int = 0, most: int = 6, size: int = LARGEST) -> Value:
        """A value of dtype kind in ``kinds`` ("f", "iu", "b") and rank least … most."""
        fits = [
            v
            for v in self.values
            if v.dtype.kind in kinds and least <= v.array.ndim <= most and v.array.size <= size
        ]
        if not fits:
            raise RejectedError("no such value")
        return self.rng.choice(fits[-4:] if self.rng.random() < 0.75 else fits)

    def operand(self, x: Value, *, anything: bool = True) -> Value:
        """Another tensor of the dtype of ``x`` that broadcasts with it."""
        fits = [v for v in self.values if v.dtype == x.dtype and _broadcast(v.shape, x.shape)]
        if anything and fits and self.rng.random() < 0.5:
            return self.rng.choice(fits)
        shape = [d if self.rng.random() < 0.6 else 1 for d in x.shape]
        return self.constant(self.contents(shape[self.rng.randint(0, len(shape)) :], x.dtype))

    def contents(self, shape: Sequence[int], dtype: Any) -> Array:
        """Random contents of ``dtype``; floats lie on a coarse grid now and then, so that ties
        and equal elements occur."""
        dtype = np.dtype(dtype)
        if dtype.kind == "f":
            array = self.numbers.standard_normal(shape)
            grid = self.rng.random() < 0.25
            return np.asarray(np.rint(array * 4) / 4 if grid else array, dtype)
        if dtype.kind == "b":
            return np.asarray(self.numbers.integers(0, 2, shape), bool)
        low = 0 if dtype.kind == "u" else -9
        return np.asarray(self.numbers.integers(low, 10, shape), dtype)

    def add(
        self, op: str, inputs: Sequence[Value | None], outputs: int = 1, **attributes: Any
    ) -> list[Value]:
        """Append a node. Raises RejectedError where it cannot be judged."""
        names = [f"v{len(self.values)}_{i}" for i in range(outputs)]
        node = helper.make_node(
            op,
            ["" if v is None else v.name for v in inputs],
            names,
            name=f"{op.lower()}_{len(self.nodes)}",
            **{k: v for k, v in attributes.items() if v is not None},
        )
        return self.append(node, {v.name: v for v in inputs if v is not None})

    def append(self, node: onnx.NodeProto, given: dict[str, Value]) -> list[Value]:
        """Append a node that reads ``given``; raises as ``add`` does."""
        exact = node.op_type in EXACT or not any(v.is_float for v in given.values())
        arrays = evaluate(node, {n: v.array for n, v in given.items()}, self.opset)
        shaken = arrays
        if any(v.shaken is not v.array for v in given.values()):
            shaken = evaluate(node, {n: v.shaken for n, v in given.items()}, self.opset)
        made = []
        for name, array, other in zip(node.output, arrays, shaken, strict=True):
            rounds = array.dtype.kind == "f" and not exact
            made.append(Value(name, array, self._shake(other) if rounds else other))
            check(made[-1], self.largest)
        self.nodes.append(node)
        self.values += made
        return made

    def _shake(self, array: Array) -> Array:
        scale = ROUNDING[array.dtype] * np.abs(array.astype(np.float64)).max(initial=0)
        return (array + scale * self.numbers.uniform(-1, 1, array.shape)).astype(array.dtype)

    def attempt(self, maker: Any) -> bool:
        """Let ``maker`` add nodes; what was added before a rejection stays."""
        held = len(self.constants)
        count = len(self.nodes)
        try:
            maker(self)
        except RejectedError as error:
            self.rejected.append((maker.__name__, str(error)))
        self.largest = LARGEST
        if len(self.nodes) == count:
            del self.constants[held:]
        return len(self.nodes) > count


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    try:
        return int(np.prod(np.broadcast_shapes(a, b))) <= LARGEST
    except ValueError:
        return False


def check(value: Value, largest_size: int = LARGEST) -> None:
    """Raises RejectedError for values that are not finite, too large, or noise."""
    array, shaken = value.array, value.shaken
    if array.size > largest_size or array.shape != shaken.shape or array.size == 0:
        raise RejectedError("its size")
    if array.dtype.kind != "f":
        if not np.array_equal(array, shaken):
            raise RejectedError("discontinuous where it is evaluated")
        return
    if array.dtype not in ROUNDING:
        raise RejectedError(f"its dtype {array.dtype}")
    if not (np.isfinite(array).all() and np.isfinite(shaken).all()):
        raise RejectedError("not finite")
    largest = float(np.abs(array).max())
    if largest > STEEPEST or 0 < largest < 1e-4:
        raise RejectedError("its magnitude")
    if deviation(value) > AMPLIFIED[array.dtype] * largest:
        raise RejectedError("amplifies rounding")


def deviation(value: Value) -> float:
    """How far rounding moves the value, at its worst element."""
    if value.dtype.kind != "f":
        return 0.0
    difference = value.array.astype(np.float64) - value.shaken.astype(np.float64)
    return float(np.abs(difference).max(initial=0))


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """ONNX Runtime without optimizations: what each node says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def evaluate(node: onnx.NodeProto, arrays: dict[str, Array], opset: int) -> list[Array]:
    """Outputs of one node. Raises RejectedError where ONNX Runtime refuses it."""
    graph = helper.make_graph(
        [node],
        "node",
        [],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    try:
        found = session(model).run(None, {})
    except Exception as error:
        raise RejectedError(f"ONNX Runtime: {' '.join(str(error).split())[:300]}") from None
    return [np.asarray(array) for array in found]
