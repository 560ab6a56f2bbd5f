"""Tensors on their way to and from a bundle: checking, batching, raw files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgepipe.codegen.plan import ALIGNMENT, TensorSpec
from edgepipe.errors import EdgepipeError, UserError, did_you_mean

Array = npt.NDArray[Any]


def check_sample(specs: Sequence[TensorSpec], sample: Mapping[str, Array]) -> dict[str, Array]:
    """Return ``sample`` in the model's order and dtypes, contiguous. Raises UserError.

    Values of another dtype of the same kind are converted where nothing is lost (float64 → float32
    is taken as rounding, as NumPy makes float64 by default).
    """
    _check_names(specs, sample)
    return {spec.name: _check_tensor(spec, np.asarray(sample[spec.name])) for spec in specs}


def split(specs: Sequence[TensorSpec], inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Cut inputs with a longer leading dimension into samples of the model's. Raises UserError."""
    _check_names(specs, inputs)
    arrays = {spec.name: np.asarray(inputs[spec.name]) for spec in specs}
    counts = {}
    for spec in specs:
        array = arrays[spec.name]
        if array.shape != spec.shape and spec.shape and array.shape[1:] == spec.shape[1:]:
            times, rest = divmod(array.shape[0], max(spec.shape[0], 1))
            if rest or not times:
                raise UserError(
                    f"leading dimension {array.shape[0]} is no multiple of {spec.shape[0]}",
                    where=f"input '{spec.name}'",
                )
            counts[spec.name] = times
    if len(set(counts.values())) > 1:
        raise UserError(f"inputs have different numbers of samples: {counts}", where="--input")
    total = next(iter(counts.values()), 1)
    return [
        {
            spec.name: arrays[spec.name][i * spec.shape[0] : (i + 1) * spec.shape[0]]
            if spec.name in counts
            else arrays[spec.name]
            for spec in specs
        }
        for i in range(total)
    ]


def join(specs: Sequence[TensorSpec], results: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Put results together: along the leading dimension, scalars along a new one."""
    return {
        spec.name: np.concatenate([r[spec.name] for r in results])
        if spec.shape
        else np.stack([r[spec.name] for r in results])
        for spec in specs
    }


def tensor_bytes(spec: TensorSpec) -> int:
    """Size of a tensor in bytes."""
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialised array whose data starts at a multiple of the bundle ABI's alignment."""
    size = tensor_bytes(TensorSpec("", shape, dtype))
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    # In two steps: an empty slice begins where its array does.
    return memory[start:][:size].view(dtype).reshape(shape)


def to_raw(samples: Iterable[Mapping[str, Array]]) -> bytes:
    """Samples as ``bench run`` reads them: raw tensors, per sample in the mapping's order."""
    return b"".join(np.ascontiguousarray(a).tobytes() for s in samples for a in s.values())


def from_raw(data: bytes, specs: Sequence[TensorSpec], count: int) -> list[dict[str, Array]]:
    """``count`` samples of outputs, as ``bench run`` writes them. Raises EdgepipeError."""
    if len(data) != (expected := count * sum(map(tensor_bytes, specs))):
        raise EdgepipeError(f"the outputs have {len(data)} bytes instead of {expected}")
    results, at = [], 0
    for _ in range(count):
        sample = {}
        for spec in specs:
            elements = int(np.prod(spec.shape, dtype=np.int64))
            part = np.frombuffer(data, spec.dtype, elements, at)
            sample[spec.name] = part.reshape(spec.shape).copy()
            at += part.nbytes
        results.append(sample)
    return results


def _check_names(specs: Sequence[TensorSpec], given: Mapping[str, Array]) -> None:
    known = [spec.name for spec in specs]
    for name in given:
        if name not in known:
            raise UserError(f"the model has no input '{name}'", fix=did_you_mean(name, known))
    if lacking := [name for name in known if name not in given]:
        raise UserError(f"input '{lacking[0]}' is missing", fix=f"inputs: {', '.join(known)}")


def _check_tensor(spec: TensorSpec, array: Array) -> Array:
    where = f"input '{spec.name}'"
    if array.shape != spec.shape:
        raise UserError(f"shape {list(array.shape)}, the model takes {list(spec.shape)}",
                        where=where)  # fmt: skip
    dtype = np.dtype(spec.dtype)
    if array.dtype != dtype:
        if not np.can_cast(array.dtype, dtype, "same_kind"):
            raise UserError(f"dtype {array.dtype}, the model takes {spec.dtype}", where=where,
                            fix=f"convert it with .astype('{spec.dtype}')")  # fmt: skip
        if dtype.kind in "iu" and array.size and not _fits(array, dtype):
            raise UserError(f"values do not fit {spec.dtype}", where=where)
        array = array.astype(dtype)
    return np.ascontiguousarray(array).reshape(spec.shape)


def _fits(array: Array, dtype: np.dtype[Any]) -> bool:
    info = np.iinfo(dtype)
    return bool(array.dtype.kind == "b" or info.min <= array.min() <= array.max() <= info.max)
