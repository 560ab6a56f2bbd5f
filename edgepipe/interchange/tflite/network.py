"""The one subgraph of a .tflite as plain lists, and its serialisation into a flatbuffer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import NDArray

from edgepipe.interchange.tflite import schema

Array = NDArray[Any]
Scalar = int | float | bool

#: Weights start at multiples of this, as kernels with vector loads expect them in a mapped file.
ALIGNMENT = 16


@dataclass(frozen=True)
class Grid:
    """Scale (a float32 number) and int8 zero point of a tensor of codes."""

    scale: float
    zero_point: int

    def code(self, value: float) -> int:
        """The code of a value, half to even, not saturated; infinities lie beyond all codes."""
        if not np.isfinite(value):
            return 2**31 if value > 0 else -(2**31)
        return int(np.rint(np.float32(value) / np.float32(self.scale))) + self.zero_point


@dataclass(frozen=True)
class Tensor:
    """``dtype``: float32, int32 or int8. ``buffer`` 0 is a tensor computed at run time.
    ``scales`` float32 [1], or one per index of ``axis``; ``zero_point`` is that of all."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: int = 0
    scales: Array | None = None
    zero_point: int = 0
    axis: int = 0


@dataclass(frozen=True)
class Operator:
    """``kind`` names an entry of ``schema.OPERATORS``; inputs and outputs are tensor indices."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Scalar] = field(default_factory=dict)


class Network:
    """Grows while the graph is translated; ``serialise`` ends it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.operators: list[Operator] = []
        self.buffers: list[bytes] = [b""]  # index 0 is "no data" by the schema
        self.inputs: list[tuple[str, int]] = []
        self.outputs: list[tuple[str, int]] = []
        self._constants: dict[tuple[Any, ...], int] = {}

    def variable(self, name: str, shape: Sequence[int], grid: Grid | None) -> int:
        """A tensor computed at run time: int8 on ``grid``, or float32 without one."""
        scales = None if grid is None else np.array([grid.scale], np.float32)
        zero = 0 if grid is None else grid.zero_point
        dtype = "float32" if grid is None else "int8"
        self.tensors.append(Tensor(name, tuple(shape), dtype, 0, scales, zero))
        return len(self.tensors) - 1

    def constant(
        self, array: Array, name: str, scales: Array | None = None, zero_point: int = 0,
        axis: int = 0,
    ) -> int:  # fmt: skip
        """A constant of dtype float32, int32 or int8; equal ones are stored once."""
        data = np.ascontiguousarray(array).tobytes()
        held = None if scales is None else np.atleast_1d(np.asarray(scales, np.float32))
        known = None if held is None else held.tobytes()
        key = (data, array.dtype.name, array.shape, known, zero_point, axis)
        if key not in self._constants:
            self.buffers.append(data)
            self.tensors.append(
                Tensor(
                    name, array.shape, array.dtype.name, len(self.buffers) - 1, held,
                    zero_point, axis,
                )
            )  # fmt: skip
            self._constants[key] = len(self.tensors) - 1
        return self._constants[key]

    def integers(self, values: Sequence[int], name: str) -> int:
        """A constant int32 vector: shapes, axes, pads."""
        return self.constant(np.array(values, np.int32).reshape(len(values)), name)

    def operator(
        self, kind: str, inputs: Sequence[int], outputs: Sequence[int], **options: Scalar
    ) -> None:
        """Append an operator; ``options`` must be fields of its kind."""
        unknown = options.keys() - schema.OPERATORS[kind].fields.keys()
        assert not unknown, f"{kind} has no option {unknown}"
        self.operators.append(Operator(kind, tuple(inputs), tuple(outputs), options))

    def rename(self, index: int, name: str) -> None:
        """Give a tensor another name."""
        self.tensors[index] = replace(self.tensors[index], name=name)

    def serialise(self, description: str) -> bytes:
        """The file."""
        return _File(self).write(description)


class _File:
    """Tables are written leaves first, as a flatbuffer wants them."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.builder = flatbuffers.Builder(sum(map(len, network.buffers)) + (1 << 16))

    def write(self, description: str) -> bytes:
        network, builder = self.network, self.builder
        kinds = list(dict.fromkeys(operator.kind for operator in network.operators))
        buffers = self._offsets([self._buffer(data) for data in network.buffers])
        codes = self._offsets([self._operator_code(schema.OPERATORS[kind]) for kind in kinds])
        tensors = self._offsets([self._tensor(tensor) for tensor in network.tensors])
        operators = self._offsets([self._operator(o, kinds) for o in network.operators])
        subgraph = self._table(
            (0, "offset", tensors),
            (1, "offset", self._integers([index for _, index in network.inputs])),
            (2, "offset", self._integers([index for _, index in network.outputs])),
            (3, "offset", operators),
            (4, "offset", builder.CreateString("main")),
        )
        model = self._table(
            (0, "Uint32", schema.SCHEMA_VERSION),
            (1, "offset", codes),
            (2, "offset", self._offsets([subgraph])),
            (3, "offset", builder.CreateString(description)),
            (4, "offset", buffers),
            (7, "offset", self._offsets([self._signature()])),
        )
        builder.Finish(model, schema.FILE_IDENTIFIER)
        return bytes(builder.Output())

    def _table(self, *fields: tuple[int, str, Any]) -> int:
        """One table of (slot, type, value); the default 0 is not stored, as is usual."""
        builder = self.builder
        builder.StartObject(max((slot for slot, _, _ in fields), default=-1) + 1)
        for slot, kind, value in fields:
            prepend = "UOffsetTRelative" if kind == "offset" else kind
            getattr(builder, f"Prepend{prepend}Slot")(slot, value, 0)
        return int(builder.EndObject())

    def _vector(self, values: Iterable[Any], width: int, prepend: Callable[[Any], None]) -> int:
        held = list(values)
        self.builder.StartVector(width, len(held), width)
        for value in reversed(held):
            prepend(value)
        return int(self.builder.EndVector())

    def _offsets(self, values: Sequence[int]) -> int:
        return self._vector(values, 4, self.builder.PrependUOffsetTRelative)

    def _integers(self, values: Sequence[int]) -> int:
        return self._vector(values, 4, self.builder.PrependInt32)

    def _buffer(self, data: bytes) -> int:
        if not data:
            return self._table()
        builder = self.builder
        builder.StartVector(1, len(data), ALIGNMENT)
        builder.head -= len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data
        return self._table((0, "offset", int(builder.EndVector())))

    def _operator_code(self, kind: schema.OperatorType) -> int:
        # Readers older than 2020 know only the byte in slot 0; 127 sends others to slot 3.
        return self._table(
            (0, "Int8", min(kind.code, 127)), (2, "Int32", kind.version), (3, "Int32", kind.code)
        )

    def _tensor(self, tensor: Tensor) -> int:
        builder = self.builder
        fields = [
            (0, "offset", self._integers(tensor.shape)),
            (1, "Int8", schema.TENSOR_TYPES[tensor.dtype]),
            (2, "Uint32", tensor.buffer),
            (3, "offset", builder.CreateString(tensor.name)),
            (8, "Bool", True),  # without it an empty shape means an unknown rank
        ]
        if tensor.scales is not None:
            scales = self._vector(tensor.scales, 4, builder.PrependFloat32)
            zeros = self._vector([tensor.zero_point] * len(tensor.scales), 8, builder.PrependInt64)
            quantization = self._table(
                (2, "offset", scales), (3, "offset", zeros), (6, "Int32", tensor.axis)
            )
            fields.append((4, "offset", quantization))
        return self._table(*fields)

    def _operator(self, operator: Operator, kinds: list[str]) -> int:
        kind = schema.OPERATORS[operator.kind]
        fields = [
            (0, "Uint32", kinds.index(operator.kind)),
            (1, "offset", self._integers(operator.inputs)),
            (2, "offset", self._integers(operator.outputs)),
        ]
        if kind.options:
            scalars = ((*kind.fields[name], value) for name, value in operator.options.items())
            fields += [(3, "Uint8", kind.options), (4, "offset", self._table(*scalars))]
        return self._table(*fields)

    def _signature(self) -> int:
        def named(pairs: list[tuple[str, int]]) -> int:
            return self._offsets(
                [
                    self._table(
                        (0, "offset", self.builder.CreateString(name)), (1, "Uint32", index)
                    )
                    for name, index in pairs
                ]
            )

        return self._table(
            (0, "offset", named(self.network.inputs)),
            (1, "offset", named(self.network.outputs)),
            (2, "offset", self.builder.CreateString("serving_default")),
        )
