"""A stream of model runs, and the checks that data pass before they become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepipe.codegen.plan import TensorSpec
from edgepipe.errors import UserError, did_you_mean

Array = NDArray[Any]
Inputs = dict[str, Array]


@dataclass(frozen=True)
class Samples:
    """Inputs for ``count`` runs of a model, read afresh by every iteration.

    Iterating gives one run at a time: input name → array of exactly the model's shape and dtype.
    ``labels`` has one class index per row of the batch dimension, for all runs together.
    """

    description: str
    count: int
    read: Callable[[], Iterator[Inputs]]
    labels: Array | None = None
    synthetic: bool = False

    def __iter__(self) -> Iterator[Inputs]:
        return self.read()

    def chunks(self, runs: int) -> Iterator[list[Inputs]]:
        """Up to ``runs`` runs at a time."""
        stream = iter(self)
        while chunk := list(islice(stream, runs)):
            yield chunk


def runs_in(spec: TensorSpec, shape: Sequence[int], dtype: np.dtype[Any], where: str) -> int:
    """How many runs an array for ``spec`` holds: its leading dimension over the model's.

    Raises UserError where shape or dtype do not fit.
    """
    wanted, given = tuple(spec.shape), tuple(shape)
    if not np.can_cast(dtype, np.dtype(spec.dtype), "same_kind"):
        raise UserError(
            f"input '{spec.name}' is {dtype}, the model wants {spec.dtype}",
            where=where,
            fix=f"save it with .astype('{spec.dtype}')",
        )
    if given == wanted:
        return 1
    fits = len(given) == len(wanted) > 0 and given[1:] == wanted[1:] and given[0] > 0
    if not fits or given[0] % wanted[0]:
        more = f"[N{', ' if wanted[1:] else ''}{', '.join(map(str, wanted[1:]))}]" if wanted else ""
        rule = f"{list(wanted)}" + (f" or {more}" if more else "")
        if more and wanted[0] > 1:
            rule += f" with N a multiple of {wanted[0]}"
        raise UserError(
            f"input '{spec.name}' has shape {list(given)}",
            where=where,
            fix=f"the model takes {rule}",
        )
    return given[0] // wanted[0]


def check_names(
    names: Sequence[str], specs: Sequence[TensorSpec], where: str, *, labels: bool
) -> None:
    """Refuse missing and unknown keys of ``names`` with a UserError."""
    known = [spec.name for spec in specs] + (["labels"] if labels else [])
    for name in names:
        if name not in known:
            raise UserError(
                f"'{name}' is not an input of the model", where=where, fix=did_you_mean(name, known)
            )
    for spec in specs:
        if spec.name not in names:
            raise UserError(
                f"input '{spec.name}' is missing",
                where=where,
                fix=f"it has {', '.join(names) or 'no arrays'}; the keys must be the input names",
            )


def common_count(counts: Mapping[str, int], where: str) -> int:
    """The number of runs that all inputs agree on; an input given once serves every run."""
    several = {name: count for name, count in counts.items() if count > 1}
    if len(set(several.values())) > 1:
        listed = ", ".join(f"'{name}' for {count} runs" for name, count in several.items())
        raise UserError(f"inputs disagree: {listed}", where=where)
    return max(several.values(), default=1)


def check_labels(labels: Array, rows: int, where: str) -> Array:
    """Class indices [rows] as int64. Raises UserError for anything else."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != rows:
        raise UserError(
            f"'labels' is {labels.dtype}{list(labels.shape)}",
            where=where,
            fix=f"it must hold one class index per sample: int64[{rows}]",
        )
    return labels.astype(np.int64)


def check_numbers(array: Array, spec: TensorSpec, run: int, where: str) -> Array:
    """``array`` in the model's dtype. Refuses NaN, which would make every comparison meaningless,
    and integers that the dtype cannot hold."""
    if array.dtype.kind == "f" and np.isnan(array).any():
        raise UserError(f"input '{spec.name}' of sample {run} contains NaN", where=where)
    converted = np.ascontiguousarray(array, dtype=spec.dtype).reshape(array.shape)
    if array.dtype.kind in "iu" and not np.array_equal(converted, array):
        raise UserError(
            f"input '{spec.name}' of sample {run} does not fit {spec.dtype}", where=where
        )
    return converted


def from_arrays(
    arrays: Mapping[str, Array], specs: Sequence[TensorSpec], where: str, *, synthetic: bool = False
) -> Samples:
    """Samples from arrays in memory, ``labels`` among them or not. Raises UserError."""
    check_names(list(arrays), specs, where, labels=True)
    counts = {s.name: runs_in(s, arrays[s.name].shape, arrays[s.name].dtype, where) for s in specs}
    count = common_count(counts, where)
    rows = count * (specs[0].shape[0] if specs and specs[0].shape else 1)
    labels = check_labels(arrays["labels"], rows, where) if "labels" in arrays else None

    def read() -> Iterator[Inputs]:
        for run in range(count):
            inputs = {}
            for spec in specs:
                array = arrays[spec.name]
                if counts[spec.name] > 1:
                    array = array[run * spec.shape[0] : (run + 1) * spec.shape[0]]
                inputs[spec.name] = check_numbers(array, spec, run, where)
            yield inputs

    described = f"{where} ({count} {'run' if count == 1 else 'runs'})"
    return Samples(described, count, read, labels, synthetic)
