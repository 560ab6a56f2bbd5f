"""What is known of a bundle after some runs: distances from the references, accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgepipe.data import Inputs
from edgepipe.errors import UserError
from edgepipe.metrics import Accuracy, Array, Distance, Steps, has_classes
from edgepipe.validation_report import StepReport

#: Runs whose values are kept for the float64 comparison.
KEPT_RUNS = 4


class Tally:
    """Distances from the reference, and the accuracy of both where there are labels."""

    def __init__(self, labels: Array | None) -> None:
        self.distances: dict[str, Distance] = {}
        self.labels, self.rows, self.runs = labels, 0, 0
        self.accuracy, self.reference_accuracy = Accuracy(), Accuracy()
        self.first: list[tuple[Inputs, Inputs, Inputs]] = []

    def add(self, inputs: Inputs, result: Inputs, expected: Inputs) -> None:
        """Account for one run. Raises UserError where the reference has other outputs."""
        for name in expected:
            distance = self.distances.setdefault(name, Distance())
            if result[name].dtype != expected[name].dtype:
                raise UserError(
                    f"output '{name}' is {result[name].dtype}, ONNX Runtime gives "
                    f"{expected[name].dtype}",
                    fix="give the model that the bundle was compiled from",
                )
            distance.add(result[name], expected[name])
        scores = next((n for n, v in expected.items() if has_classes(v.shape)), None)
        if self.labels is not None and scores is not None:
            labels = self.labels[self.rows : self.rows + len(expected[scores])]
            self.accuracy.add(result[scores], labels)
            self.reference_accuracy.add(expected[scores], labels)
            self.rows += len(labels)
        if len(self.first) < KEPT_RUNS:
            self.first.append((inputs, result, expected))
        self.runs += 1


class StepTally:
    """Distances from the Q/DQ model, in steps of each output's codes.

    ``known`` has the step of outputs that are quantized themselves. Others come unrounded from the
    last accumulator; their step is that of a grid of ``bits`` over what the reference's values
    and zero span.
    """

    def __init__(self, known: dict[str, float], bits: int) -> None:
        self.known, self.last_code = known, 2**bits - 1
        self.steps: dict[str, Steps] = {}
        self.distances: dict[str, Distance] = {}

    def add(self, result: Inputs, expected: Inputs) -> None:
        """Account for one run."""
        for name, wanted in expected.items():
            self.steps.setdefault(name, Steps()).add(result[name], wanted)
            self.distances.setdefault(name, Distance()).add(result[name], wanted)

    def reports(self) -> tuple[StepReport, ...]:
        """One per output."""
        found = []
        for name, steps in self.steps.items():
            step = self.known.get(name, steps.span / self.last_code)
            largest = steps.largest / step if step > 0.0 else np.inf * steps.largest
            found.append(
                StepReport(
                    name,
                    step,
                    float(steps.share_within(step)),
                    0.0 if steps.largest == 0.0 else largest,
                    self.distances[name].snr_db,
                )
            )
        return tuple(found)


def nearest(tallies: Sequence[StepTally]) -> tuple[StepReport, ...]:
    """The reports of the reference that a bundle is nearest to; empty where there is none."""
    found = [tally.reports() for tally in tallies]
    return max(found, key=lambda r: min((s.within_one, s.snr_db) for s in r), default=())
