"""Does a bundle compute what the original model computes? Judged by ONNX Runtime.

A float32 bundle passes with an SNR of at least 100 dB on every output. Networks that amplify
rounding (random weights with BatchNorm, deep recurrences) put even two correct programs further
apart; below the floor, bundle and ONNX Runtime are therefore both compared with a float64 run of
the model, and the bundle passes if it is no more than 6 dB further from it than ONNX Runtime is.
An explicit ``min_snr_db`` is taken as it is.

A quantized bundle is asked two questions. Does it compute its Q/DQ model? At most one value in
a thousand may be more than one quantization step off. And is that model still good? What it loses
against the float original is reported, and judged by the floors that the user gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgepipe import runners
from edgepipe.data import Inputs, Samples, from_arrays, open_data, synthetic
from edgepipe.errors import UserError
from edgepipe.integer_reference import integer_run
from edgepipe.judge import floor_db, judge_outputs, judge_steps, judge_top1
from edgepipe.metrics import Array
from edgepipe.reference import Reference, find_reference, open_reference, quantized_runs
from edgepipe.tally import StepTally, Tally, nearest
from edgepipe.validation_report import Report

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle
    from edgepipe.importer.source import Source

__all__ = ["Report", "validate"]

QDQ_FILE = "model.qdq.onnx"
_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Trial:
    """What a bundle is run on and compared with. ``exact`` is the original model, or None where it
    cannot be asked; ``rounded`` the Q/DQ model of a quantized bundle, in every way that it can be
    executed. ``original`` finds the original model, ``integers`` how its integers are defined."""

    samples: Samples
    exact: Callable[[Inputs], Inputs] | None
    rounded: tuple[Callable[[Inputs], Inputs], ...]
    original: Callable[[], Reference]
    integers: Callable[[], Callable[[Inputs], Inputs] | None]


def validate(
    bundle: Bundle,
    data: str | Path | Mapping[str, Array] | Samples | None = None,
    *,
    min_snr_db: float | None = None,
    max_top1_drop: float | None = None,
    runner: str | None = None,
    model: str | Path | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
    source: Source | None = None,
) -> Report:
    """Run ``bundle`` through ``runner`` and compare with ONNX Runtime on the original model.

    ``data`` is SRC (see ``edgepipe.data``), arrays by input name, or samples already opened.
    Without it the bundle's golden inputs and outputs are used, which need no original model, or
    with ``model`` seeded synthetic inputs. ``model`` names the original where the manifest's
    origin does not lead to it. A quantized bundle is compared with its Q/DQ model too: on the same
    data where that is in the bundle (``compile --emit onnx``), else on the golden inputs. Of the
    two ways in which ONNX Runtime executes that, the nearer one counts; where that is too far, the
    definition of the integer arithmetic decides, on the first runs; with float operators between
    integers a bundle may be as far from that as ONNX Runtime is.
    ``max_top1_drop`` is in percentage points: of accuracy with labels, else of agreement.
    ``step`` is called with (runs done, runs in all). ``source`` is the original, loaded already.
    Raises UserError.
    """
    chosen = runners.pick(bundle.target, runner).NAME
    trial = _trial(bundle, data, model, source)
    tally, steps = Tally(trial.samples.labels), [_step_tally(bundle) for _ in trial.rounded]
    done = 0
    for chunk in trial.samples.chunks(_chunk_runs(bundle)):
        results = runners.run_many(bundle, chunk, chosen)
        for inputs, result in zip(chunk, results, strict=True):
            expected = trial.exact(inputs) if trial.exact is not None else {}
            tally.add(inputs, result, expected)
            for one, rounded in zip(steps, trial.rounded, strict=True):
                one.add(result, rounded(inputs))
        done += len(chunk)
        step(done, trial.samples.count)
    steps_data = trial.samples.description
    kept, rounded_runs = [(inputs, result) for inputs, result, _ in tally.first], trial.rounded
    if bundle.recipe.changes_weights and not steps:
        golden, outputs = _golden(bundle)
        steps_data, steps = golden.description, [_step_tally(bundle)]
        kept = list(zip(golden, runners.run_many(bundle, list(golden), chosen), strict=True))
        steps[0].add(kept[0][1], outputs)
        rounded_runs = (lambda _: outputs,)
    found, exact, between = nearest(steps), _step_tally(bundle), _step_tally(bundle)
    halves = bundle.target.halves(bundle.recipe)
    halves = halves or any(output.dtype == "float16" for output in bundle.outputs)
    doubts = judge_steps(bundle.recipe, found, halves=halves)
    if doubts and (integers := trial.integers()) is not None:
        for inputs, result in kept:
            defined = integers(inputs)
            exact.add(result, defined)
            between.add(rounded_runs[0](inputs), defined)
        apart = between.reports() if _has_float_islands(bundle) else ()
        doubts = judge_steps(bundle.recipe, exact.reports(), halves=halves, between=apart)
    floor = min_snr_db
    if floor is None:
        floor = floor_db(bundle.recipe, synthetic=trial.samples.synthetic)
    exactly = bundle.recipe.format == "fp32" and not bundle.recipe.changes_weights
    arbiter = trial.original if min_snr_db is None and exactly else None
    reports, failures = judge_outputs(tally, floor, arbiter)
    failures = doubts + failures
    if max_top1_drop is not None:
        failures += judge_top1(tally, max_top1_drop)
    return Report(
        bundle=bundle.path.name,
        runner=chosen,
        data=trial.samples.description,
        synthetic=trial.samples.synthetic,
        runs=done,
        outputs=reports,
        min_snr_db=floor,
        accuracy=tally.accuracy.top1 if tally.rows else None,
        reference_accuracy=tally.reference_accuracy.top1 if tally.rows else None,
        max_top1_drop=max_top1_drop,
        failures=tuple(failures),
        steps=found,
        steps_data=steps_data if found else None,
        integer_steps=exact.reports(),
        reference_steps=between.reports(),
    )


def _trial(
    bundle: Bundle,
    data: str | Path | Mapping[str, Array] | Samples | None,
    model: str | Path | None,
    source: Source | None = None,
) -> _Trial:
    facts = bundle.manifest.get("quantization")
    imported = facts is not None and facts["imported"]
    find, kept = partial(find_reference, bundle), partial(_golden_integers, bundle)
    if source is not None:
        find = partial(Reference, source, None)
    if data is None and model is None:
        samples, outputs = _golden(bundle)
        if not bundle.recipe.changes_weights:
            return _Trial(samples, lambda _: outputs, (), find, kept)
        floats = bundle.golden_floats()
        exact = (lambda _: floats) if floats else None
        return _Trial(samples, exact, (lambda _: outputs,), find, kept)
    reference = open_reference(bundle, model)
    if isinstance(data, Samples):
        samples = data
    elif data is None:
        samples = synthetic(bundle.inputs)
    else:
        samples = open_data(data, bundle.inputs, reference.preprocessing)

    def original() -> Reference:
        return reference

    if imported:
        rounded = quantized_runs(reference.source.proto_bytes())
        return _Trial(samples, reference.run, rounded, original, reference.integers)
    if QDQ_FILE in bundle.manifest["files"]:
        qdq = bundle.file(QDQ_FILE).read_bytes()
        defined = partial(integer_run, qdq)
        return _Trial(samples, reference.run, quantized_runs(qdq), original, defined)
    return _Trial(samples, reference.run, (), original, kept)


def _golden_integers(bundle: Bundle) -> Callable[[Inputs], Inputs] | None:
    outputs = bundle.golden_integers()
    return (lambda _: outputs) if outputs else None


def _golden(bundle: Bundle) -> tuple[Samples, Inputs]:
    inputs, outputs = bundle.golden()
    if not outputs:
        raise UserError(
            "no reference could run the original model, so there are no golden outputs",
            where=bundle.path.name,
        )
    samples = from_arrays(inputs, bundle.inputs, "golden inputs of the bundle", synthetic=True)
    return samples, outputs


def _has_float_islands(bundle: Bundle) -> bool:
    """Whether float operators stand between integers; without them the definition is exact."""
    borders = ("QuantizeLinear", "DequantizeLinear", "Relayout")
    kernels = bundle.manifest["kernels"]
    return any(k["arithmetic"] == "float32" and k["op_type"] not in borders for k in kernels)


def _step_tally(bundle: Bundle) -> StepTally:
    """With the scale of every output that is quantized itself, by the manifest."""
    facts = bundle.manifest.get("quantization") or {}
    return StepTally(dict(facts.get("output_steps", {})), bundle.recipe.activation_bits or 8)


def _chunk_runs(bundle: Bundle) -> int:
    """Runs handed to a runner at once: processes start slowly, memory is finite."""
    size = sum(
        math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        for spec in (*bundle.inputs, *bundle.outputs)
    )
    return max(1, min(256, _CHUNK_BYTES // max(size, 1)))
