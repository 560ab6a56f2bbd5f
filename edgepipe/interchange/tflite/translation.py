"""The state of one translation: which tensor of the graph is stored where, and what converters
do to it. Converters (``converters/``) are functions of a ``Translation`` and a ``Step``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgepipe.errors import Unsupported
from edgepipe.interchange.tflite import schema
from edgepipe.interchange.tflite.layout import Place, arrange, same_order
from edgepipe.interchange.tflite.network import Array, Grid, Network, Scalar
from edgepipe.interchange.tflite.reading import (
    CONFIG_FIX,
    Result,
    codes_of,
    constant_of,
    shape_of,
    unsupported,
)
from edgepipe.quantization.graph import name_of

LOWEST, HIGHEST = -128, 127


@dataclass(frozen=True)
class Step:
    """One operator of the graph and what becomes of each of its outputs."""

    node: ir.Node
    results: tuple[Result, ...]
    bias: Array | None = None

    @property
    def result(self) -> Result:
        """Of the first output."""
        return self.results[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return shape_of(self.node.outputs[0])

    @property
    def grid(self) -> Grid:
        """Of the first output; Unsupported where nothing rounds it."""
        if self.result.grid is None:
            raise unsupported(self.node, "no QuantizeLinear rounds what it writes", CONFIG_FIX)
        return self.result.grid


class Translation:
    """Stored tensors by the graph's values (codes, or float where nothing is rounded)."""

    def __init__(self) -> None:
        self.network = Network()
        self._places: dict[ir.Value, dict[bool, Place]] = {}
        self._floats: dict[tuple[int, bool], Place] = {}

    # What converters read.

    def read(self, value: ir.Value | None, channels_last: bool | None = None) -> Place:
        """The stored tensor; ``channels_last`` None takes it as it lies."""
        assert value is not None
        places = self._places.get(codes_of(value) or value)
        if places is None:
            raise Unsupported(
                f"'{value.name}' is a constant where a computed tensor is needed", where="tflite"
            )
        first = next(iter(places.values()))
        wanted = first.channels_last if channels_last is None else channels_last
        if wanted not in places:
            places[wanted] = self._rearrange(first, wanted)
        return places[wanted]

    def codes(self, step: Step, value: ir.Value | None, channels_last: bool | None = None) -> Place:
        """As ``read``, of a tensor that must be quantized."""
        place = self.read(value, channels_last)
        if place.grid is None:
            producer = value.producer() if value is not None else None
            origin = f" by {producer.op_type} '{producer.name}'" if producer else ""
            reason = f"its input is computed in float{origin}"
            raise unsupported(step.node, reason, CONFIG_FIX)
        return place

    def operand(
        self, step: Step, value: ir.Value | None, channels_last: bool | None = None
    ) -> Place:
        """Codes where the step's result is rounded; float32 behind the last integer operator."""
        if step.result.grid is not None:
            return self.codes(step, value, channels_last)
        return self.floats(self.read(value, channels_last))

    def floats(self, place: Place) -> Place:
        """The tensor as float32."""
        if place.grid is None:
            return place
        key = place.index, place.channels_last
        if key not in self._floats:
            name = f"{self.network.tensors[place.index].name}/float"
            self._floats[key] = self.emit("DEQUANTIZE", [place], replace(place, grid=None), name)
        return self._floats[key]

    def is_last(self, value: ir.Value | None) -> bool:
        """Whether the value lies channels last."""
        return self.read(value).channels_last

    # What converters write.

    def emit(
        self, kind: str, inputs: Sequence[Place | int], like: Place, name: str, **options: Scalar
    ) -> Place:
        """Append an operator that writes a new tensor; ``like`` says all but its index."""
        stored = arrange(like.shape, like.channels_last, 1)
        index = self.network.variable(name, stored, like.grid)
        indices = [i.index if isinstance(i, Place) else i for i in inputs]
        self.network.operator(kind, indices, [index], **options)
        return replace(like, index=index)

    def write(
        self,
        step: Step,
        kind: str,
        inputs: Sequence[Place | int],
        like: Place,
        **options: Scalar,
    ) -> None:
        """``emit`` the operator that computes the step's result, and ``keep`` it.

        An operator with a fused activation takes the Relu or Clip behind it along.
        """
        result, rest = step.result, step.result
        if "activation" in schema.OPERATORS[kind].fields and like.grid == result.grid:
            code, done = fused_activation(result)
            options["activation"] = code
            rest = replace(result, low=-np.inf, high=np.inf) if done else result
        self.keep(rest, self.emit(kind, inputs, like, name_of(result.value), **options))

    def keep(self, result: Result, place: Place) -> None:
        """Store a result, cut to the bounds not yet applied.

        It stays on the grid that its operator wrote, where tflite prescribes one: a second
        rounding to the graph's own would only lose. Bounds are cut on the graph's grid, which
        mostly ends there.
        """
        name = name_of(result.value)
        bounded = result.low > -np.inf or result.high < np.inf
        if result.grid is not None and (place.grid is None or bounded):
            place = self.regrid(place, result.grid, name)
            place = self.cut(place, result.low, result.high, name)
        self._places[result.key] = self._places[result.value] = {place.channels_last: place}

    def regrid(self, place: Place, grid: Grid, name: str) -> Place:
        """The same values on another grid, or float32 values rounded to one."""
        if place.grid == grid:
            return place
        return self.emit("QUANTIZE", [place], replace(place, grid=grid), name)

    def cut(self, place: Place, low: float, high: float, name: str) -> Place:
        """Cut to ``low`` … ``high``, as far as the grid does not end there anyway."""
        for kind, bound in (("MAXIMUM", low), ("MINIMUM", high)):
            if place.grid is None:
                held, scale, zero = np.array(bound, np.float32), None, 0
                implied = not np.isfinite(bound)
            else:
                code = place.grid.code(bound)
                implied = code <= LOWEST if kind == "MAXIMUM" else code >= HIGHEST
                held = np.array(np.clip(code, LOWEST, HIGHEST), np.int8)
                scale, zero = np.array([place.grid.scale]), place.grid.zero_point
            if not implied:
                limit = self.network.constant(held, f"{name}/bound", scale, zero)
                place = self.emit(kind, [place, limit], place, name)
        return place

    def add_input(self, value: ir.Value) -> None:
        """A graph input: float32, images channels last."""
        shape = shape_of(value)
        last = len(shape) == 4
        index = self.network.variable(name_of(value), arrange(shape, last, 1), None)
        self.network.inputs.append((name_of(value), index))
        self._places[value] = {last: Place(index, shape, None, last)}

    def add_output(self, value: ir.Value) -> None:
        """A graph output: float32, images channels last, under its own name."""
        place = self.floats(self.read(value, len(shape_of(value)) == 4))
        taken = {index for _, index in (*self.network.inputs, *self.network.outputs)}
        if place.index in taken:
            shape = self.network.integers(place.stored_shape, "shape")
            place = self.emit("RESHAPE", [place, shape], place, name_of(value))
        self.network.rename(place.index, name_of(value))
        self.network.outputs.append((name_of(value), place.index))

    def constant_operand(self, step: Step, array: Array, name: str, channels_last: bool) -> int:
        """A constant factor or summand: float32, or 8 bits on a grid of its own.

        One number alone is exact (it is its own scale).
        """
        rank = len(step.shape)
        if channels_last:
            array = array.reshape((1,) * (rank - array.ndim) + array.shape)
            order = [axis for axis in (0, 2, 3, 1) if axis < rank]
            stored = arrange(array.shape, True, 1)
            array = array.transpose(order).reshape(stored)
        array = np.asarray(array, np.float32)
        if step.result.grid is None:
            return self.network.constant(array, name)
        if np.unique(array).size == 1 and array.flat[0] != 0:
            codes = np.sign(array).astype(np.int8)
            return self.network.constant(codes, name, np.abs(array.reshape(-1)[:1]))
        low, high = min(float(array.min()), 0.0), max(float(array.max()), 0.0)
        scale = np.float32((high - low) / 255) if high > low else np.float32(1)
        zero = int(np.clip(np.rint(LOWEST - low / scale), LOWEST, HIGHEST))
        codes = np.clip(np.rint(array / scale) + zero, LOWEST, HIGHEST).astype(np.int8)
        return self.network.constant(codes, name, np.array([scale]), zero)

    def reshape(self, place: Place, like: Place, name: str) -> Place:
        """The same elements in the same order under another shape."""
        stored = self.network.integers(like.stored_shape, "shape")
        return self.emit("RESHAPE", [place, stored], like, name)

    def transpose(self, place: Place, order: Sequence[int], like: Place, name: str) -> Place:
        """Reorder the stored axes; a reshape where only axes of length one move."""
        if list(order) == sorted(order) and place.stored_shape == like.stored_shape:
            return replace(like, index=place.index)
        if same_order(place.stored_shape, order):
            return self.reshape(place, like, name)
        return self.emit("TRANSPOSE", [place, self.network.integers(order, "order")], like, name)

    def _rearrange(self, place: Place, channels_last: bool) -> Place:
        like = replace(place, channels_last=channels_last)
        name = f"{self.network.tensors[place.index].name}/{'last' if channels_last else 'plain'}"
        if len(place.shape) == 4:
            return self.transpose(
                place, (0, 2, 3, 1) if channels_last else (0, 3, 1, 2), like, name
            )
        n, c, length = place.shape
        # [N, C, L] ↔ [N, 1, L, C], through a tensor of the graph's rank stored as [N, L, C].
        turned = replace(place, shape=(n, length, c), channels_last=False)
        if channels_last:
            return self.reshape(self.transpose(place, (0, 2, 1), turned, name), like, name)
        return self.transpose(self.reshape(place, turned, name), (0, 2, 1), like, name)


def fused_activation(result: Result) -> tuple[int, bool]:
    """The activation code for the bounds of a result on its grid, and whether it is all of them.

    Bounds beyond the codes of the grid cut off nothing and need no activation.
    """
    if result.grid is None:
        return schema.NONE, False
    low = result.low if result.grid.code(result.low) > LOWEST else -np.inf
    high = result.high if result.grid.code(result.high) < HIGHEST else np.inf
    # RELU6 also cuts at 0, which is no loss where the grid ends there.
    starts_at_zero = low == 0.0 or (low == -np.inf and result.grid.zero_point == LOWEST)
    if (low, high) == (-np.inf, np.inf):
        return schema.NONE, True
    if (low, high) == (0.0, np.inf):
        return schema.RELU, True
    if starts_at_zero and high == 6.0:
        return schema.RELU6, True
    if (low, high) == (-1.0, 1.0):
        return schema.RELU_N1_TO_1, True
    return schema.NONE, False


def parameter(step: Step, index: int, what: str) -> Array | None:
    """A constant input such as axes or sizes; None where it is absent."""
    inputs = step.node.inputs
    if len(inputs) <= index or inputs[index] is None:
        return None
    held = constant_of(inputs[index])
    if held is None:
        raise unsupported(step.node, f"its {what} are computed")
    return held
