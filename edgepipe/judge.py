"""From distances to a verdict: the floors, and why an output is below one."""

from __future__ import annotations

import math
from collections.abc import Callable

from edgepipe.display import db_text
from edgepipe.errors import UserError
from edgepipe.metrics import Distance
from edgepipe.recipe import Recipe
from edgepipe.reference import Reference
from edgepipe.tally import Tally
from edgepipe.validation_report import OutputReport, StepReport, share

#: SNR in dB against the original model that every output must reach, by format. Half floats
#: round each number by up to 2⁻¹², 66 dB below it, and errors add up along the layers.
FLOORS_DB = {"fp32": 100.0, "fp16": 40.0}
#: The same of quantized formats, on real data: below it the result has nothing of the original.
QUANTIZED_FLOOR_DB = 10.0
#: Share of an output's values that must be at most one step from the Q/DQ model's.
WITHIN_ONE_STEP = 0.999
#: SNR in dB against the Q/DQ model where activations are float: sums in another order.
WEIGHT_ONLY_FLOOR_DB = 80.0
#: How much further from float64 than ONNX Runtime a bundle may be: twice the noise amplitude.
AMPLIFICATION_MARGIN_DB = 6.0


def floor_db(recipe: Recipe, *, synthetic: bool) -> float | None:
    """The SNR against the original that bundles of ``recipe`` must reach; None for quantized ones
    on noise: what rounding does to that says nothing."""
    if recipe.changes_weights:
        return None if synthetic else QUANTIZED_FLOOR_DB
    return FLOORS_DB[recipe.format]


def judge_outputs(
    tally: Tally, floor: float | None, reference: Callable[[], Reference] | None
) -> tuple[tuple[OutputReport, ...], list[str]]:
    """Each output against the original, and a line for each below ``floor``.

    With ``reference``, which finds the original, a float64 run of it decides for those.
    """
    distances = tally.distances
    below = [name for name, d in distances.items() if floor is not None and d.snr_db < floor]
    against64: dict[str, tuple[float, float]] = {}
    failures: list[str] = []
    if below and reference is not None:
        try:
            against64 = _against_float64(tally, reference(), below)
        except Exception as error:  # any operator may lack a float64 evaluation
            failures.append(
                f"no float64 run to judge amplification by: {' '.join(str(error).split())}"
            )
    for name in below:
        text = f"{name}: SNR {db_text(distances[name].snr_db)} dB is below {floor:g}"
        if name not in against64:
            failures.append(text)
            continue
        further = against64[name][1] - against64[name][0]
        if further > AMPLIFICATION_MARGIN_DB:
            failures.append(
                f"{text}, and {further:.1f} dB further from a float64 run than ONNX Runtime is"
            )
    outputs = tuple(
        OutputReport(
            name, d.snr_db, d.cosine, d.max_abs, d.top1_agreement,
            *against64.get(name, (None, None)),
        )
        for name, d in distances.items()
    )  # fmt: skip
    return outputs, failures


def _against_float64(
    tally: Tally, reference: Reference, names: list[str]
) -> dict[str, tuple[float, float]]:
    """(bundle's, ONNX Runtime's) SNR in dB against a float64 run, of the first runs."""
    ours = {name: Distance() for name in names}
    theirs = {name: Distance() for name in names}
    for inputs, result, expected in tally.first:
        exact = reference.run_float64(inputs)
        for name in names:
            ours[name].add(result[name], exact[name])
            theirs[name].add(expected[name], exact[name])
    return {name: (ours[name].snr_db, theirs[name].snr_db) for name in names}


def judge_steps(
    recipe: Recipe,
    reports: tuple[StepReport, ...],
    *,
    halves: bool = False,
    between: tuple[StepReport, ...] = (),
) -> list[str]:
    """A line for each output of a quantized bundle that is not what its Q/DQ model says.

    ``halves``: float activations lie in memory as halves, which allows the error of fp16.
    ``between`` tells how far two references are from each other: where float operators stand
    between integers, as in a transformer, a last bit there moves codes, and every layer more of
    them. An output about as near as those are to each other is no failure.
    """
    failures = []
    floor = FLOORS_DB["fp16"] if halves else WEIGHT_ONLY_FLOOR_DB
    amplified = {r.name: r.snr_db for r in between if r.snr_db > QUANTIZED_FLOOR_DB}
    for report in reports:
        if report.snr_db >= amplified.get(report.name, math.inf) - AMPLIFICATION_MARGIN_DB:
            continue
        if recipe.integer and report.within_one < WITHIN_ONE_STEP:
            failures.append(
                f"{report.name}: only {share(report.within_one)} of the values are within one step "
                f"of the Q/DQ model, {share(WITHIN_ONE_STEP)} must be"
            )
        elif not recipe.integer and report.snr_db < floor:
            failures.append(
                f"{report.name}: SNR {db_text(report.snr_db)} dB against the Q/DQ model is below "
                f"{floor:g}"
            )
    return failures


def judge_top1(tally: Tally, limit: float) -> list[str]:
    """Lines where more than ``limit`` percentage points of accuracy are lost, or without labels
    of agreement. Raises UserError where no output has classes."""
    if tally.rows:
        drop = 100 * (tally.reference_accuracy.top1 - tally.accuracy.top1)
        lost = [f"accuracy drops by {drop:.2f} points, more than {limit:g}"]
        return lost if drop > limit else []
    agreements = {name: d.top1_agreement for name, d in tally.distances.items()}
    shares = {name: value for name, value in agreements.items() if value is not None}
    if not shares:
        raise UserError(
            "no output has classes [batch, classes ≥ 2]",
            where="--max-top1-drop",
            fix="use --min-snr-db",
        )
    return [
        f"{name}: another winner in {100 * (1 - value):.2f} % of rows, more than {limit:g}"
        for name, value in shares.items()
        if 100 * (1 - value) > limit
    ]
