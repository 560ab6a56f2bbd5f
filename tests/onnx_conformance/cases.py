"""The onnx package's own backend test cases that are *edge core*.

Edge core: operators of the standard domain over float32, float16, int8, uint8, int32, int64 and
bool tensors; no training, random, string, sequence, optional, loss or classic-ML cases. Inputs
that an operator needs at compile time (shapes, axes, pads, …) are frozen to initializers.
"""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_DTYPES = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
}
_LEFT_OUT = {
    "random": {
        *("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
        "RandomUniformLike",
    },
    "loss": {"SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss"},
    "string and text": {"TfIdfVectorizer", "ImageDecoder"},
    "optional": {"OptionalHasElement", "OptionalGetElement", "Optional"},
}
#: Operator → inputs that must be known at compile time.
_STATIC_INPUTS: dict[str, tuple[int, ...]] = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1, 2),
    "ConstantOfShape": (0,),
    "CumProd": (1,),
    "CumSum": (1,),
    "DFT": (1, 2),
    "Dropout": (1, 2),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "If": (0,),
    "Loop": (0, 1),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
    "OneHot": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "ReduceL1": (1,),
    "ReduceL2": (1,),
    "ReduceLogSum": (1,),
    "ReduceLogSumExp": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceMin": (1,),
    "ReduceProd": (1,),
    "ReduceSum": (1,),
    "ReduceSumSquare": (1,),
    "Reshape": (1,),
    "Resize": (1, 2, 3),
    "STFT": (1, 2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Trilu": (1,),
    "Unsqueeze": (1,),
    "Upsample": (1,),
}


@dataclass(frozen=True)
class Case:
    """One test: a model, its inputs by name, the outputs expected, and onnx's tolerance."""

    name: str
    model: onnx.ModelProto
    inputs: dict[str, np.ndarray[Any, Any]]
    outputs: list[np.ndarray[Any, Any]]
    rtol: float
    atol: float


@functools.cache
def edge_core() -> dict[str, Case]:
    """All edge-core cases by name, generated in memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases
        from onnx.backend.test.loader import load_model_tests

        raw = list(collect_testcases(None))
        for kind in ("simple", "pytorch-converted", "pytorch-operator"):
            raw += load_model_tests(kind=kind)
    frozen = {c.name: _frozen_names(_model(c)) for c in raw}
    cases = {}
    for c in raw:
        model = _model(c)
        if not _is_edge_core(model, c.name):
            continue
        inputs, outputs = _data(c, model)
        names = frozen[c.name] | frozen.get(re.sub(r"_expanded.*$", "", c.name), set())
        cases[c.name] = _freeze(Case(c.name, model, inputs, outputs, c.rtol, c.atol), names)
    return cases


def _model(case: Any) -> onnx.ModelProto:
    if case.model is not None:
        return case.model
    return onnx.load(Path(case.model_dir) / "model.onnx")


def _data(
    case: Any, model: onnx.ModelProto
) -> tuple[dict[str, np.ndarray[Any, Any]], list[np.ndarray[Any, Any]]]:
    """The first data set of a case."""
    initializers = {i.name for i in model.graph.initializer}
    names = [i.name for i in model.graph.input if i.name not in initializers]
    if case.data_sets is not None:
        inputs, outputs = case.data_sets[0]
    else:
        folder = Path(case.model_dir) / "test_data_set_0"
        inputs, outputs = (
            [_read(folder / f"{kind}_{i}.pb") for i in range(len(list(folder.glob(f"{kind}_*"))))]
            for kind in ("input", "output")
        )
    as_arrays = [[_array(a) for a in part] for part in (inputs, outputs)]
    return dict(zip(names, as_arrays[0], strict=False)), as_arrays[1]


def _read(path: Path) -> TensorProto:
    tensor = TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return tensor


def _array(value: Any) -> np.ndarray[Any, Any]:
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def _is_edge_core(model: onnx.ModelProto, name: str) -> bool:
    values = [*model.graph.input, *model.graph.output]
    if any(
        not v.type.HasField("tensor_type") or v.type.tensor_type.elem_type not in _DTYPES
        for v in values
    ):
        return False
    if any(n.domain not in ("", "ai.onnx") for n in model.graph.node):
        return False
    words = set().union(*_LEFT_OUT.values())
    if any(
        n.op_type in words or ("Sequence" in n.op_type and n.op_type != "ReverseSequence")
        for n in model.graph.node
    ):
        return False
    return not re.search(
        r"training|train_|_nllloss|_sce_|bernoulli|sequence_|_seq_|optional|dropout.*_mask.*ratio$",
        name.replace("reversesequence", "").replace("with_sequence_length", ""),
    )


def _frozen_names(model: onnx.ModelProto) -> set[str]:
    names = {i.name for i in model.graph.input}
    return {
        node.input[i]
        for node in model.graph.node
        for i in _STATIC_INPUTS.get(node.op_type, ())
        if i < len(node.input) and node.input[i] in names
    }


def _freeze(case: Case, names: set[str]) -> Case:
    names = names & set(case.inputs)
    if not names:
        return case
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for value in [v for v in model.graph.input if v.name in names]:
        model.graph.input.remove(value)
    for name in sorted(names):
        model.graph.initializer.append(numpy_helper.from_array(case.inputs[name], name))
    inputs = {k: v for k, v in case.inputs.items() if k not in names}
    return Case(case.name, model, inputs, case.outputs, case.rtol, case.atol)
