"""Golden samples: inputs made from a seed and what the original model answers to them."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edgepipe.codegen.plan import TensorSpec
from edgepipe.onnx_parts import OnnxParts
from edgepipe.onnx_session import open_session

Array = npt.NDArray[np.generic]
_Run = Callable[[OnnxParts, Mapping[str, Array]], tuple[str, list[Array]]]


def synthetic_inputs(
    inputs: Sequence[TensorSpec],
    seed: int = 0,
    integer_limit: int = 8,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Array]:
    """Seeded inputs: floats normal with deviation 1, or uniform in the range that ``ranges`` has
    for their name; bool fair; integers in [0, integer_limit)."""
    random = np.random.default_rng(seed)
    values: dict[str, Array] = {}
    for tensor in inputs:
        dtype = np.dtype(tensor.dtype)
        if dtype.kind == "f" and tensor.name in (ranges or {}):
            low, high = (ranges or {})[tensor.name]
            values[tensor.name] = random.uniform(low, high, tensor.shape).astype(dtype)
        elif dtype.kind == "f":
            values[tensor.name] = random.standard_normal(tensor.shape, np.float32).astype(dtype)
        elif dtype.kind == "b":
            values[tensor.name] = random.integers(0, 2, tensor.shape).astype(dtype)
        else:
            values[tensor.name] = random.integers(0, integer_limit, tensor.shape).astype(dtype)
    return values


def golden(
    model: bytes | OnnxParts,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[dict[str, Array], dict[str, Array], str]:
    """Return inputs, the outputs of ``model`` for them, and the name of the reference.

    Integers are often indices whose range the model does not tell: where the reference refuses
    them, smaller ones are tried. When no reference can run the model, outputs is empty and the
    name is ``none``. ``ranges``: see ``synthetic_inputs``.
    """
    parts = OnnxParts.of(model)
    for run in _REFERENCES:
        for limit in (8, 2, 1):
            values = synthetic_inputs(inputs, integer_limit=limit, ranges=ranges)
            got, name = _outputs(run, parts, values, outputs)
            if got:
                return values, got, name
    return synthetic_inputs(inputs, ranges=ranges), {}, "none"


def outputs_of(
    model: bytes | OnnxParts, values: Mapping[str, Array], outputs: Sequence[str]
) -> tuple[dict[str, Array], str]:
    """Outputs of ``model`` by name, and the reference that computed them; empty and
    ``none`` where no reference can."""
    for run in _REFERENCES:
        got, name = _outputs(run, OnnxParts.of(model), values, outputs)
        if got:
            return got, name
    return {}, "none"


def _outputs(
    run: _Run, model: OnnxParts, values: Mapping[str, Array], outputs: Sequence[str]
) -> tuple[dict[str, Array], str]:
    try:
        name, results = run(model, values)
    except Exception:  # each reference has error types of its own for each cause
        return {}, "none"
    return dict(zip(outputs, results, strict=True)), name


def _onnxruntime(model: OnnxParts, values: Mapping[str, Array]) -> tuple[str, list[Array]]:
    import onnxruntime

    session = open_session(model, relayout=False)
    return f"onnxruntime {onnxruntime.__version__}", session.run(None, dict(values))


def _onnx_reference(model: OnnxParts, values: Mapping[str, Array]) -> tuple[str, list[Array]]:
    import onnx
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(model.proto())
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        results = [np.asarray(result) for result in evaluator.run(None, dict(values))]
    return f"onnx reference {onnx.__version__}", results


_REFERENCES: tuple[_Run, ...] = (_onnxruntime, _onnx_reference)


def npz_bytes(arrays: Mapping[str, Array]) -> bytes:
    """``arrays`` as an uncompressed .npz whose bytes depend on nothing else."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape))
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(info, member.getvalue())
    return buffer.getvalue()
