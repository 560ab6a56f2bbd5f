"""Layer by layer in topological order: weights fitted to the inputs that rounding leaves them.

Two fronts advance together, one of the float network and one of the quantized. At every layer
the quantized front gives the input, the float front the wanted output. Samples are as many as
memory holds from there to the end: once activations stay small, more samples catch up through
the part that is already done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError
from edgepipe.quantization.activation_aware import Rows
from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.executor import Program, Rounding, Values, compile_part
from edgepipe.quantization.gram import Gram
from edgepipe.quantization.graph import Array, bounds, dims, is_op, outer_values
from edgepipe.quantization.layers import Layer
from edgepipe.quantization.placement import Placement, Unit
from edgepipe.quantization.remarks import Note
from edgepipe.quantization.weight_only import quantize_weights
from edgepipe.quantization.weights import check_weights, quantize_layer

#: 8-bit weights are fitted to fewer samples where inputs are large: 128, or as many as have this
#: many elements (128 instead of 512 cost 0.2 dB on ResNet20, and save MobileNetV2 half the time).
#: Ranges are taken from all.
EIGHT_BIT_SAMPLES = 128
EIGHT_BIT_ELEMENTS = 1 << 22
#: Rows of the Gram matrix per column, where there are that many, and at least.
ROWS_PER_COLUMN = 64
LEAST_ROWS = 1 << 15
#: Elements of all patches of a layer: rows are fewer where there are many groups, and above
#: twice this the fit does not look behind the activation.
PATCHES = 1 << 24
#: Elements of one chunk of patches.
CHUNK = 1 << 22


class Fronts:
    """The values that are still to be read, of the float and of the quantized network."""

    def __init__(
        self, units: Sequence[Unit], keep: set[ir.Value], inputs: Values, rounding: Rounding,
        most: int, memory_bytes: int,
    ) -> None:  # fmt: skip
        self.units, self.inputs, self.rounding = units, inputs, rounding
        self.live = _live_after(units, keep)
        self.total = most
        # Half is for the samples themselves, the rest also for what one layer needs on the way.
        self.memory = memory_bytes // 3
        self.rooms = self._rooms()
        self.done = 0
        self.count = self.rooms[0] if units else self.total
        self.exact: Values = {v: a[: self.count] for v, a in inputs.items()}
        self.rounded: Values = dict(self.exact)

    def _rooms(self) -> list[int]:
        """Per unit, how many samples fit while it and every later one is computed."""
        rooms: list[int] = []
        least = self.total
        for index in reversed(range(len(self.units))):
            before = self.live[index - 1] if index else []
            outputs = [v for node in self.units[index].nodes for v in node.outputs]
            values = [v for v in [*before, *outputs] if v not in self.inputs]
            each = sum(5 * int(np.prod(dims(v) or (1,))) for v in values)
            least = max(1, min(least, self.memory // max(each, 1)))
            rooms.append(least)
        return rooms[::-1]

    def adjust(self) -> None:
        """Let more samples catch up where there is room for them from here on."""
        room = self.rooms[self.done]
        if room >= 2 * self.count or (room == self.total > self.count):
            start, self.count = self.count, room
            wanted = [v for v in self.live[self.done - 1] if v not in self.inputs]
            new = {v: a[start:room] for v, a in self.inputs.items()}
            before = self.units[: self.done]
            self._extend(self.exact, new, compile_part(before, wanted, None))
            self._extend(self.rounded, new, compile_part(before, wanted, self.rounding))

    @staticmethod
    def _extend(front: Values, inputs: Values, program: Program) -> None:
        found = {**inputs, **program.run(inputs)}
        for value in front:
            front[value] = np.concatenate([front[value], found[value]])

    def advance(self, exact: Values, unit: Unit) -> None:
        """Take the float outputs of a unit, compute the quantized ones, drop what is read."""
        outputs = [v for v in unit.nodes[-1].outputs if v in set(self.live[self.done])]
        if outputs:
            program = compile_part([unit], outputs, self.rounding)
            self.rounded.update(program.run(self.rounded))
            self.exact.update({v: exact[v] for v in outputs})
        keep = set(self.live[self.done])
        for front in (self.exact, self.rounded):
            for value in [v for v in front if v not in keep]:
                del front[value]
        self.done += 1

    def rounded_floats(self, value: ir.Value, start: int, stop: int) -> Array:
        """What integer readers of ``value`` see, float32, for samples start…stop."""
        array = self.rounded[value][start:stop]
        if value not in self.rounding.placement.group:
            return array
        grid = self.rounding.grid(value)
        return grid.values(array) if self.rounding.holds_codes(value) else grid.round(array)


def fit(
    placement: Placement,
    rounding: Rounding,
    inputs: Values,
    config: QuantConfig,
    note: Note,
    progress: Callable[[str], None],
) -> None:
    """Fill ``rounding.weights`` for every integer layer."""
    method = config.fit
    layers = [unit for unit in placement.units if unit.linear is not None]
    linear = [unit.linear for unit in layers if unit.linear is not None]
    for node in linear:
        check_weights(Layer.of(node), note)
    if method is None:
        for unit in layers:
            _fit_layer(unit, None, rounding, None, config, note)
        return
    units = placement.units
    last = max((i for i, unit in enumerate(units) if unit.linear is not None), default=-1)
    if not inputs:
        raise UserError("a model without inputs cannot be calibrated", where="--recipe",
                        fix="use a float recipe")  # fmt: skip
    most = len(next(iter(inputs.values())))
    if all(rounding.placement.formats[n].weight_bits == 8 for n in linear):
        each = max(1, sum(array[0].size for array in inputs.values()))
        most = min(most, max(EIGHT_BIT_SAMPLES, EIGHT_BIT_ELEMENTS // each))
    fronts = Fronts(units[: last + 1], set(), inputs, rounding, most, config.memory_bytes)
    done = 0
    for unit in units[: last + 1]:
        fronts.adjust()
        wanted = [v for v in unit.nodes[-1].outputs if v.name]
        before = unit.linear.outputs[0] if unit.linear is not None else None
        if unit.linear is not None:
            before = _before_activation(unit)
            wanted = list(dict.fromkeys([*wanted, before]))
        exact = compile_part([unit], wanted, None).run(fronts.exact)
        if unit.linear is not None and before is not None:
            layer = Layer.of(unit.linear)
            moments = None
            if layer.has_columns:
                source = unit.linear.inputs[0]
                assert source is not None
                moments = _moments(layer, source, unit, exact[before], fronts)
            else:
                note(unit.linear.name, f"{unit.linear.op_type} is rounded, not reconstructed")
            _fit_layer(unit, moments, rounding, method, config, note)
            done += 1
            progress(f"quantizing layer {done} of {len(layers)}")
        fronts.advance(exact, unit)


def _before_activation(unit: Unit) -> ir.Value:
    """The sum that the unit's accumulator should become: past the residual, before the clip."""
    tail = [n for n in unit.nodes if n is unit.linear or is_op(n, "Add")]
    return tail[-1].outputs[0]


def _fit_layer(
    unit: Unit,
    moments: tuple[Gram, Rows | None] | None,
    rounding: Rounding,
    method: str | None,
    config: QuantConfig,
    note: Note,
) -> None:
    """Set the weights of one layer."""
    assert unit.linear is not None
    source = unit.linear.inputs[0]
    assert source is not None
    layer, (gram, rows) = Layer.of(unit.linear), moments or (None, None)
    span = rounding.placement.formats[unit.linear].span
    if config.activation_bits is None:
        weights = quantize_weights(layer, span, config.group_size, method, gram, note)
    else:
        scale = float(rounding.grid(source).scale)
        weights = quantize_layer(layer, span, method, gram, scale, note, rows)
    rounding.weights[unit.linear] = weights


def _moments(
    layer: Layer, source: ir.Value, unit: Unit, wanted: Array, fronts: Fronts
) -> tuple[Gram, Rows | None]:
    """Second moments, and the rows they were taken of where an activation follows."""
    columns = layer.matrix(layer.weight).shape[-1]
    gram = Gram(layer.groups, layer.outputs // layer.groups, columns)
    batch = wanted.shape[1] if layer.node.op_type == "Conv" else 1  # images of one sample
    per_image, images = wanted[0].size // (layer.outputs * batch), batch * fronts.count
    goal = max(min(LEAST_ROWS, PATCHES // (columns * layer.groups)), ROWS_PER_COLUMN * columns)
    picked = min(per_image, -(-goal // images))
    step = max(1, CHUNK // (picked * batch * columns * layer.groups))
    generator = np.random.default_rng(0)
    limits = bounds(unit.nodes[-1])
    # 8-bit weights gained nothing from a look behind the activation (measured).
    bits = fronts.rounding.placement.formats[layer.node].weight_bits
    if bits == 8 or picked * images * columns * layer.groups > 2 * PATCHES:
        limits = None
    kept: list[tuple[Array, Array, Array | None]] = []
    for start in range(0, fronts.count, step):
        stop = min(start + step, fronts.count)
        arrays = [fronts.rounded_floats(source, start, stop), wanted[start:stop]]
        if unit.residual is not None:
            arrays.append(fronts.rounded_floats(unit.residual, start, stop))
        rows = None
        if layer.node.op_type == "Conv":
            arrays = [array.reshape(-1, *array.shape[2:]) for array in arrays]
            if picked < per_image:
                rows = np.sort(generator.choice(per_image, picked, replace=False))
        x, y = layer.patches(arrays[0], rows), layer.rows(arrays[1], rows)
        added = layer.rows(arrays[2], rows) if len(arrays) > 2 else None
        gram.add(x, y if added is None else y - added)
        if limits is not None:
            kept.append((x, y, added))
    if limits is None:
        return gram, None
    x, y = (np.concatenate([k[i] for k in kept], 1) for i in (0, 1))
    residual = [k[2] for k in kept if k[2] is not None]
    return gram, Rows(x, y, np.concatenate(residual, 1) if residual else None, *limits)


def _live_after(units: Sequence[Unit], keep: set[ir.Value]) -> list[list[ir.Value]]:
    """Per unit, the computed values that something after it still reads."""
    needed: dict[ir.Value, None] = dict.fromkeys(keep)
    result: list[list[ir.Value]] = []
    for unit in reversed(units):
        result.append([v for v in needed if v.const_value is None])
        for node in unit.nodes:
            for value in outer_values(node):
                if value.const_value is None:
                    needed[value] = None
        for node in unit.nodes:
            for value in node.outputs:
                needed.pop(value, None)
    return result[::-1]
