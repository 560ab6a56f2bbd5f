"""Static shapes: every input gets one, and inference carries them through the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import shape_inference

from edgepipe.errors import Unsupported, UserError, did_you_mean
from edgepipe.importer.checks import MAX_TENSOR_BYTES, first_line, tensor_bytes, type_name
from edgepipe.importer.judge import doubt
from edgepipe.onnx_parts import OnnxParts

_REFUSED_TYPES = ("UNDEFINED", "STRING", "COMPLEX64", "COMPLEX128")


def drop_initializer_inputs(proto: onnx.ModelProto) -> None:
    """Remove initializers from the graph's inputs (IR versions below 4 listed them there)."""
    names = {t.name for t in proto.graph.initializer}
    kept = [i for i in proto.graph.input if i.name not in names]
    if len(kept) < len(proto.graph.input):
        copies = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in kept]
        del proto.graph.input[:]
        proto.graph.input.extend(copies)
    proto.ir_version = max(proto.ir_version, 4)


def fix_inputs(proto: onnx.ModelProto, given: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Make every input of ``proto`` static, in place.

    A shape in ``given`` (by input name) wins where the model leaves a dimension open. A symbol
    bound by one input holds for all of them. A leading dimension still open becomes 1.
    Raises UserError for an unknown input name, a wrong rank, a contradiction, or a dimension
    that stays open.
    """
    inputs = {i.name: i for i in proto.graph.input}
    for name in given:
        if name not in inputs:
            raise UserError(
                f"the model has no input '{name}'", where="--shape", fix=did_you_mean(name, inputs)
            )
    symbols: dict[str, int] = {}
    for name, value in inputs.items():
        _check_type(value, where)
        if name in given:
            _apply(value, given[name], symbols)
    for value in inputs.values():
        _bind_batch(value, symbols)
    for value in inputs.values():
        _close(value, symbols, where)
    for output in proto.graph.output:
        if output.name in inputs:  # declared once more
            output.type.CopyFrom(inputs[output.name].type)
    # Shapes the exporter noted may hold for another batch; inference tells them anew.
    del proto.graph.value_info[:]


def _check_type(value: onnx.ValueInfoProto, where: str) -> None:
    here = f"{where}, input '{value.name}'"
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value") or "no type"
        raise Unsupported(f"is not a tensor ({kind})", where=here, fix="give the model tensors")
    element = type_name(value.type.tensor_type.elem_type)
    if element in _REFUSED_TYPES:
        raise Unsupported(f"element type {element} is not supported", where=here)


def _apply(value: onnx.ValueInfoProto, shape: tuple[int, ...], symbols: dict[str, int]) -> None:
    where, name = "--shape", value.name
    text = ",".join(map(str, shape))
    if any(dim < 0 for dim in shape):
        raise UserError(f"{name}={text} has a negative dimension", where=where)
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        tensor.shape.CopyFrom(onnx.TensorShapeProto())
        for dim in shape:
            tensor.shape.dim.add(dim_value=dim)
        return
    if len(tensor.shape.dim) != len(shape):
        raise UserError(
            f"{name}={text} has {len(shape)} dimensions, the model has {_show(value)}",
            where=where,
            fix=f"give {len(tensor.shape.dim)}",
        )
    for axis, (dim, size) in enumerate(zip(tensor.shape.dim, shape, strict=True)):
        if _is_static(dim):
            if dim.dim_value != size:
                raise UserError(
                    f"{name}={text}: dimension {axis} is fixed to {dim.dim_value} in the model",
                    where=where,
                    fix=f"the model has {_show(value)}",
                )
            continue
        if dim.dim_param and symbols.setdefault(dim.dim_param, size) != size:
            raise UserError(
                f"{name}={text}: dimension '{dim.dim_param}' is {size} here and "
                f"{symbols[dim.dim_param]} elsewhere",
                where=where,
            )
        dim.dim_value = size


def _is_static(dim: onnx.TensorShapeProto.Dimension) -> bool:
    # Some exporters write -1 for a free dimension.
    return bool(dim.HasField("dim_value") and dim.dim_value >= 0)


def _bind_batch(value: onnx.ValueInfoProto, symbols: dict[str, int]) -> None:
    dims = value.type.tensor_type.shape.dim
    if dims and not _is_static(dims[0]):
        size = symbols.setdefault(dims[0].dim_param, 1) if dims[0].dim_param else 1
        dims[0].dim_value = size


def _close(value: onnx.ValueInfoProto, symbols: dict[str, int], where: str) -> None:
    here = f"{where}, input '{value.name}'"
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise UserError(
            "has no shape", where=here, fix=f"give it, e.g. --shape {value.name}=1,3,224,224"
        )
    for dim in tensor.shape.dim:
        if not _is_static(dim) and dim.dim_param in symbols:
            dim.dim_value = symbols[dim.dim_param]
    if not all(_is_static(dim) for dim in tensor.shape.dim):
        raise UserError(
            f"has dynamic shape {_show(value)}",
            where=here,
            fix=f"fix it, e.g. --shape {value.name}={_example(tensor)}",
        )
    probe = onnx.TensorProto(
        data_type=tensor.elem_type, dims=[d.dim_value for d in tensor.shape.dim]
    )
    tensor_bytes(probe, here)


def _example(tensor: onnx.TypeProto.Tensor) -> str:
    """A shape the user may have meant: an image for rank 4, else 128 where a size is open."""
    dims = tensor.shape.dim
    likely = (1, 3, 224, 224) if len(dims) == 4 else (128,) * len(dims)
    sizes = [d.dim_value if _is_static(d) else n for d, n in zip(dims, likely, strict=True)]
    return ",".join(map(str, sizes))


def _show(value: onnx.ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return (
        "["
        + ",".join(str(d.dim_value) if _is_static(d) else d.dim_param or "?" for d in dims)
        + "]"
    )


def infer(proto: onnx.ModelProto, light: onnx.ModelProto, where: str, reference: OnnxParts) -> None:
    """Write the shape and type of every value that inference can tell into ``proto``.

    ``light`` is ``proto`` without its weights, and consumed. ``reference`` settles the doubt
    where strict inference refuses: a model that ONNX Runtime loads is kept. Raises UserError
    for graphs whose shapes contradict each other, and for values above 2 GiB.
    """
    # A declared output shape may hold for another batch: only its absence lets inference speak.
    for output in light.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        inferred = shape_inference.infer_shapes(light, strict_mode=True, data_prop=True)
    except Exception as error:  # InferenceError and several pybind types
        try:
            if doubt(reference) is not None:
                raise
            inferred = shape_inference.infer_shapes(light, data_prop=True)
        except Exception:
            raise UserError(
                f"shapes do not fit together: {first_line(error)}", where=where
            ) from None
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        _check_size(value, where)
    proto.graph.value_info.extend(inferred.graph.value_info)
    for declared, found in zip(proto.graph.output, inferred.graph.output, strict=True):
        if found.type.tensor_type.HasField("shape"):
            declared.type.CopyFrom(found.type)


def _check_size(value: onnx.ValueInfoProto, where: str) -> None:
    tensor = value.type.tensor_type
    dims = [d.dim_value for d in tensor.shape.dim if _is_static(d)]
    if len(dims) < len(tensor.shape.dim) or not tensor.elem_type:
        return
    item = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).itemsize
    size = math.prod(dims) * item
    if size > MAX_TENSOR_BYTES:
        raise UserError(
            f"shape {dims} needs {size / 2**30:.1f} GiB; the limit is 2 GiB",
            where=f"{where}, value '{value.name}'",
        )
