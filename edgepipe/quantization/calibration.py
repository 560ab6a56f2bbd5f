"""Samples that may be calibrated with, and the ranges they give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import onnx_ir as ir

from edgepipe.errors import UserError, did_you_mean
from edgepipe.quantization.config import QuantConfig
from edgepipe.quantization.executor import Values, compile_part
from edgepipe.quantization.graph import Array, dims, name_of
from edgepipe.quantization.observers import SMALLEST_SCALE, Grid, GridStyle, Histogram, choose
from edgepipe.quantization.placement import Placement
from edgepipe.quantization.remarks import Note

#: Fewer samples than this give ranges that the next sample leaves.
FEW = 16


def collect(
    graph: ir.Graph, samples: Iterable[Mapping[str, Array]], config: QuantConfig, note: Note
) -> Values:
    """The checked samples as arrays [samples, *shape], one per input of the model.

    Raises UserError for wrong names, shapes or numbers. Takes ``config.max_samples`` at most, and
    fewer where they would fill more than half of ``config.memory_bytes``; both are noted.
    """
    inputs = [value for value in graph.inputs if name_of(value) not in graph.initializers]
    each = sum(4 * int(np.prod(dims(value) or (1,))) for value in inputs)
    most = max(1, min(config.max_samples, config.memory_bytes // 2 // max(each, 1)))
    # One array from the start: the system hands out its pages as they are filled.
    kept = {value: np.empty((most, *(dims(value) or ())), _dtype(value)) for value in inputs}
    stream = iter(samples)
    count = 0
    for sample in islice(stream, most):
        _check_names(sample, inputs, count)
        for value in inputs:
            kept[value][count] = _checked(np.asarray(sample[name_of(value)]), value, count)
        count += 1
    if count == 0:
        raise UserError("there are no samples", where="calibration", fix="give at least one")
    if count < FEW:
        note(
            "calibration",
            f"only {count} samples: ranges and reconstruction rest on little",
            doubt=True,
        )
    elif count == most and next(stream, None) is not None:
        note("calibration", f"used the first {count} samples")
    stacked = {value: array[:count] for value, array in kept.items()}
    for value, array in stacked.items():
        if count > 1 and array.size and array.dtype.kind == "f" and np.ptp(array) == 0.0:
            note(value.name, "every sample of this input is the same constant", doubt=True)
    return stacked


def _dtype(value: ir.Value) -> np.dtype[Any]:
    """The type that samples of an input are kept in."""
    dtype: np.dtype[Any] = (value.dtype or ir.DataType.FLOAT).numpy()
    return dtype


def _check_names(sample: Mapping[str, Array], inputs: list[ir.Value], index: int) -> None:
    names = [name_of(value) for value in inputs]
    for name in sample:
        if name not in names:
            raise UserError(
                f"'{name}' is not an input of the model",
                where=f"calibration sample {index}",
                fix=did_you_mean(name, names),
            )
    for name in names:
        if name not in sample:
            raise UserError(f"input '{name}' is missing", where=f"calibration sample {index}")


def _checked(array: Array, value: ir.Value, index: int) -> Array:
    shape, dtype = dims(value), value.dtype
    where = f"input '{value.name}' of calibration sample {index}"
    if shape is None or dtype is None:
        raise UserError("the model's shape is not static", where=where)
    if array.shape != shape:
        raise UserError(
            f"its shape is {list(array.shape)}, the model takes {list(shape)}", where=where
        )
    if not np.can_cast(array.dtype, dtype.numpy(), "same_kind"):
        raise UserError(f"it is {array.dtype}, the model takes {dtype.numpy()}", where=where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError("it has values that are NaN or infinite", where=where)
    return array.astype(dtype.numpy())


def ranges(
    graph: ir.Graph, placement: Placement, inputs: Values, config: QuantConfig, note: Note
) -> dict[int, Grid]:
    """The grid of every group, from the float network on all samples."""
    values = list(placement.group)
    if not values:
        return {}
    histograms = {value: Histogram() for value in values}
    computed = [value for value in values if value.producer() is not None]
    program = compile_part(placement.units, computed, None)
    for index in range(len(next(iter(inputs.values())))):
        sample = {value: array[index : index + 1] for value, array in inputs.items()}
        for value, array in {**sample, **program.run(sample)}.items():
            if value in histograms:
                if not np.isfinite(array).all():
                    raise UserError(
                        f"the float model computes NaN or infinity for sample {index}",
                        where=f"tensor '{value.name}'",
                    )
                histograms[value].add(array)
    return _grids(placement, histograms, config, note)


def _grids(
    placement: Placement, histograms: dict[ir.Value, Histogram], config: QuantConfig, note: Note
) -> dict[int, Grid]:
    merged: dict[int, Histogram] = {}
    names: dict[int, str] = {}
    for value, number in placement.group.items():
        merged.setdefault(number, Histogram()).merge(histograms[value])
        names.setdefault(number, name_of(value))
        seen = histograms[value]
        if seen.low == seen.high:
            note(value.name, f"this tensor is {seen.low:g} for every sample", doubt=True)
    grids = {}
    for number, histogram in merged.items():
        style = GridStyle(
            placement.bits[number], config.signed_activations, config.symmetric_activations
        )
        grid = choose(histogram, config.observer, style, config.percentile)
        if float(grid.scale) <= SMALLEST_SCALE:
            text = "its range underflows: raised to the smallest usable scale"
            note(names[number], text, doubt=True)
        if not np.isfinite(grid.scale):
            raise UserError(
                "its range does not fit float32 scales", where=f"tensor '{names[number]}'"
            )
        grids[number] = grid
    return grids
