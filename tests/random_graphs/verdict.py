"""Whether what a compiled graph computes is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from edgepipe.metrics import snr_db
from edgepipe.quantization.interpreter import Interpreter
from edgepipe.reference import quantized_runs
from edgepipe.tally import StepTally, nearest
from tests.random_graphs.builder import Array, evaluate, session
from tests.random_graphs.generate import Case

#: How far an output may be from ONNX Runtime's: so often what rounding was seen to do to it, and
#: a share of its largest element.
AMPLE, SHARE = 6.0, {"f4": 2e-6, "f2": 4e-3}
#: Relative size of the noise that shows how far rounding may move an output.
NOISE = 1e-6
#: Distance of the integers from the float graph, in dB, that no rounding to 8 bits explains.
FAR_DB = 0.0
#: Share of values that may be more than a step from ONNX Runtime on the Q/DQ model.
BEYOND_ONE_STEP = 1e-3


@dataclass(frozen=True)
class Verdict:
    """``status``: right, refused, wrong, crashed, or unclear (rounding decides the result)."""

    status: str
    detail: str = ""


def _difference(found: Array, expected: Array, name: str) -> str | float:
    """The largest difference, or why none can be told."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{name} is {found.dtype}{list(found.shape)}, not {expected.dtype}{expected.shape}"
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return f"{name} is not finite"
    same = np.isfinite(b)
    return float(np.abs(a - b)[same].max(initial=0))


def _beyond(found: Array, expected: Array, name: str, deviation: float) -> str:
    """Why an output is wrong, "" where it is not."""
    difference = _difference(found, expected, name)
    if isinstance(difference, str):
        return difference
    largest = float(np.abs(expected.astype(np.float64)).max(initial=0))
    allowed = AMPLE * deviation + SHARE.get(expected.dtype.str[1:], 0.0) * largest
    if difference <= allowed:
        return ""
    return f"{name} is {difference:.3g} off, allowed {allowed:.3g} of {largest:.3g}"


def by_deviation(found: Mapping[str, Array], case: Case) -> Verdict:
    """Against what each value was when the graph was made; where that is too far, against what all
    would be in float64: ONNX Runtime rounds too."""
    outputs = case.outputs
    if found.keys() != outputs.keys():
        return Verdict("wrong", f"outputs {list(found)} instead of {list(outputs)}")
    wrong = [_beyond(found[n], e.array, n, e.deviation) for n, e in outputs.items()]
    if any(wrong):
        exact = in_doubles(case.model, case.inputs)
        if not any(_beyond(found[n], exact[n], n, 0.0) for n in outputs):
            return Verdict("right")
    return _verdict(wrong)


def in_doubles(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs with float64 for float32, rounded once: by ONNX's own evaluator, and node by
    node, so that ONNX Runtime computes those that it has not, in float32."""
    opset = model.opset_import[0].version
    values = {t.name: _wide(numpy_helper.to_array(t)) for t in model.graph.initializer}
    values |= {name: _wide(array) for name, array in inputs.items()}
    for node in model.graph.node:
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        for attribute in wide.attribute:
            if attribute.name == "stash_type":
                attribute.i = onnx.TensorProto.DOUBLE
        given = {name: values[name] for name in node.input if name}
        try:
            with np.errstate(all="ignore"):
                found = ReferenceEvaluator(wide, opsets={"": opset}).run(None, given)
        except Exception:  # operators and modes that it lacks: whatever it raises
            found = evaluate(node, {n: _narrow(a) for n, a in given.items()}, opset)
        values |= {n: _wide(np.asarray(a)) for n, a in zip(node.output, found, strict=True)}
    return {o.name: _narrow(values[o.name]) for o in model.graph.output}


def _wide(array: Array) -> Array:
    return array.astype(np.float64) if array.dtype == np.float32 else array


def _narrow(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _verdict(wrong: list[str]) -> Verdict:
    said = [text for text in wrong if text]
    return Verdict("wrong", "; ".join(said)) if said else Verdict("right")


def by_noise(
    found: Mapping[str, Array], model: onnx.ModelProto, inputs: Mapping[str, Array]
) -> Verdict:
    """Against ONNX Runtime on ``model``, and where that is too far, on ``model`` with noise."""
    names = [o.name for o in model.graph.output]
    expected = dict(zip(names, session(model).run(names, dict(inputs)), strict=True))
    tight = [_beyond(found[n], np.asarray(expected[n]), n, 0.0) for n in names]
    if not any(tight):
        return Verdict("right")
    deviations = dict.fromkeys(names, 0.0)
    for seed in range(3):
        noisy, given = _shaken(model, inputs, seed)
        other = dict(zip(names, session(noisy).run(names, given), strict=True))
        for name in names:
            moved = _difference(np.asarray(other[name]), np.asarray(expected[name]), name)
            moved = np.inf if isinstance(moved, str) else moved
            deviations[name] = max(deviations[name], moved)
    wrong = [_beyond(found[n], np.asarray(expected[n]), n, deviations[n]) for n in names]
    if any(wrong):
        return _verdict(wrong)
    unclear = [n for n in names if deviations[n] > 1e-3 * np.abs(expected[n]).max(initial=0)]
    if unclear:
        return Verdict("unclear", f"rounding moves {unclear} by {deviations[unclear[0]]:.3g}")
    return Verdict("right")


def _shaken(
    model: onnx.ModelProto, inputs: Mapping[str, Array], seed: int
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    numbers = np.random.default_rng(seed)

    def shake(array: Array) -> Array:
        if array.dtype.kind != "f" or array.size < 2:
            return array
        factor = 1 + NOISE * numbers.uniform(-1, 1, array.shape)
        return np.asarray(array * factor, array.dtype)

    noisy = onnx.ModelProto()
    noisy.CopyFrom(model)
    scales = {name for n in model.graph.node if n.op_type == "Resize" for name in n.input[1:]}
    for tensor in noisy.graph.initializer:
        if tensor.name in scales:
            continue
        tensor.CopyFrom(numpy_helper.from_array(shake(numpy_helper.to_array(tensor)), tensor.name))
    return noisy, {name: shake(array) for name, array in inputs.items()}


def by_integers(
    found: Mapping[str, Array],
    interpreter: Interpreter,
    model: bytes,
    case: Case,
    steps: dict[str, float],
    falls_back: bool,
) -> Verdict:
    """Against the definition of the integer arithmetic; and that against ONNX Runtime on the Q/DQ
    model and the float graph. Bit for bit, where no operator is computed in float, be it by
    definition or because no kernel has it (``falls_back``)."""
    inputs = case.inputs
    defined = interpreter.run(inputs)
    exact = not interpreter.floats and not falls_back
    defined = {n: np.asarray(a, found[n].dtype) for n, a in defined.items()}
    wrong = []
    for name, expected in defined.items():
        if not np.array_equal(found[name], expected) and exact:
            wrong.append(f"{name} is {_difference(found[name], expected, name)} off its definition")
    wrong += [] if exact else _steps_off(dict(found), [defined], steps, "its definition")
    if wrong:
        return _verdict(wrong)
    references = [run(dict(inputs)) for run in quantized_runs(model)]
    doubts = _steps_off(defined, references, steps, "ONNX Runtime")
    for name, float_output in case.outputs.items():
        array = float_output.array
        if array.dtype.kind == "f" and snr_db(defined[name], array) < FAR_DB:
            doubts.append(f"{name} has nothing of the float graph's")
    return (
        Verdict("unclear", "the definition: " + "; ".join(doubts)) if doubts else Verdict("right")
    )


def _steps_off(
    found: dict[str, Array], references: list[dict[str, Array]], steps: dict[str, float], what: str
) -> list[str]:
    tallies = []
    for reference in references:
        tally = StepTally(steps, 8)
        tally.add(found, reference)
        tallies.append(tally)
    return [
        f"{r.name}: {r.within_one:.4f} of it within a step of {what}, {r.max_steps:.3g} steps off"
        for r in nearest(tallies)
        if r.within_one < 1 - BEYOND_ONE_STEP
    ]
