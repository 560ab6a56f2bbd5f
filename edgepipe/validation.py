"""Does a bundle compute what the original model computes? Judged by ONNX Runtime.

A float32 bundle passes with an SNR of at least 100 dB on every output. Networks that amplify
rounding (random weights with BatchNorm, deep recurrences) put even two correct programs further
apart; below the floor, bundle and ONNX Runtime are therefore both compared with a float64 run of
the model, and the bundle passes if it is no more than 6 dB further from it than ONNX Runtime is.
An explicit ``min_snr_db`` is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgepipe import runners
from edgepipe.data import Inputs, Samples, from_arrays, open_data, synthetic
from edgepipe.display import db_text, table
from edgepipe.errors import UserError
from edgepipe.metrics import Accuracy, Array, Distance, has_classes
from edgepipe.reference import Reference, find_reference, open_reference

if TYPE_CHECKING:
    from edgepipe.bundle import Bundle

#: SNR in dB that a bundle must reach on every output, by recipe format.
FLOORS_DB = {"fp32": 100.0}

#: How much further from float64 than ONNX Runtime a bundle may be: twice the noise amplitude.
AMPLIFICATION_MARGIN_DB = 6.0

#: Runs that the float64 comparison looks at.
FLOAT64_RUNS = 4

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class OutputReport:
    """One output against the reference. ``snr64_db`` and ``reference_snr64_db`` are the bundle's
    and ONNX Runtime's SNR against a float64 run, where that was needed."""

    name: str
    snr_db: float
    cosine: float
    max_abs: float
    top1_agreement: float | None
    snr64_db: float | None = None
    reference_snr64_db: float | None = None


@dataclass(frozen=True)
class Report:
    """The result of a validation. ``accuracy`` and ``reference_accuracy`` are top-1 in 0…1."""

    bundle: str
    runner: str
    data: str
    synthetic: bool
    runs: int
    outputs: tuple[OutputReport, ...]
    min_snr_db: float
    accuracy: float | None = None
    reference_accuracy: float | None = None
    max_top1_drop: float | None = None
    failures: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every output is above its floor."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The report for ``json.dumps``; infinities are the strings "inf" and "-inf"."""

        def plain(value: Any) -> Any:
            if isinstance(value, float) and not math.isfinite(value):
                return str(value)
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        fields: dict[str, Any] = plain(asdict(self))
        return {"ok": self.ok, **fields}

    def __str__(self) -> str:
        rows = [
            [
                o.name,
                db_text(o.snr_db),
                f"{o.cosine:.9f}",
                f"{o.max_abs:.3g}",
                "–" if o.top1_agreement is None else f"{100 * o.top1_agreement:.2f} %",
            ]
            for o in self.outputs
        ]
        lines = [
            f"{self.bundle} by {self.runner}, against ONNX Runtime",
            f"data: {self.data}"
            + (" – synthetic: says nothing of accuracy" if self.synthetic else ""),
            "",
            table(["output", "SNR dB", "cosine", "max abs", "top-1 agreement"], rows),
        ]
        for o in self.outputs:
            if o.snr64_db is not None and o.reference_snr64_db is not None:
                lines.append(
                    f"{o.name} against float64: bundle {db_text(o.snr64_db)} dB, "
                    f"ONNX Runtime {db_text(o.reference_snr64_db)} dB"
                )
        if self.accuracy is not None and self.reference_accuracy is not None:
            lines.append(
                f"accuracy: bundle {100 * self.accuracy:.2f} %, "
                f"ONNX Runtime {100 * self.reference_accuracy:.2f} %"
            )
        lines += (
            ["", *(f"FAILED  {text}" for text in self.failures)] if self.failures else ["", "ok"]
        )
        return "\n".join(lines)


def validate(
    bundle: Bundle,
    data: str | Path | Mapping[str, Array] | Samples | None = None,
    *,
    min_snr_db: float | None = None,
    max_top1_drop: float | None = None,
    runner: str | None = None,
    model: str | Path | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Run ``bundle`` through ``runner`` and compare with ONNX Runtime on the original model.

    ``data`` is SRC (see ``edgepipe.data``), arrays by input name, or samples already opened.
    Without it the bundle's golden inputs and outputs are used, which need no original model, or
    with ``model`` seeded synthetic inputs. ``model`` names the original where the manifest's
    origin does not lead to it.
    ``max_top1_drop`` is in percentage points: of accuracy with labels, else of agreement.
    ``step`` is called with (runs done, runs in all). Raises UserError.
    """
    chosen = runners.pick(bundle.target, runner).NAME
    reference: Reference | None = None
    if data is None and model is None:
        samples, expected = _golden(bundle)
    else:
        reference = open_reference(bundle, model)
        expected = reference.run
        if isinstance(data, Samples):
            samples = data
        elif data is None:
            samples = synthetic(bundle.inputs)
        else:
            samples = open_data(data, bundle.inputs, reference.preprocessing)
    tally = _Tally(samples.labels)
    for chunk in samples.chunks(_chunk_runs(bundle)):
        results = runners.run_many(bundle, chunk, chosen)
        for inputs, result in zip(chunk, results, strict=True):
            tally.add(inputs, result, expected(inputs))
        step(tally.runs, samples.count)
    return _judge(bundle, chosen, samples, tally, reference, min_snr_db, max_top1_drop)


def _golden(bundle: Bundle) -> tuple[Samples, Callable[[Inputs], Inputs]]:
    inputs, outputs = bundle.golden()
    if not outputs:
        raise UserError(
            "no reference could run the original model, so there are no golden outputs",
            where=bundle.path.name,
        )
    samples = from_arrays(inputs, bundle.inputs, "golden inputs of the bundle", synthetic=True)
    return samples, lambda _: outputs


def _chunk_runs(bundle: Bundle) -> int:
    """Runs handed to a runner at once: processes start slowly, memory is finite."""
    size = sum(
        math.prod(spec.shape) * np.dtype(spec.dtype).itemsize
        for spec in (*bundle.inputs, *bundle.outputs)
    )
    return max(1, min(256, _CHUNK_BYTES // max(size, 1)))


class _Tally:
    """What is known after some runs."""

    def __init__(self, labels: Array | None) -> None:
        self.distances: dict[str, Distance] = {}
        self.labels, self.rows, self.runs = labels, 0, 0
        self.accuracy, self.reference_accuracy = Accuracy(), Accuracy()
        self.first: list[tuple[Inputs, Inputs, Inputs]] = []

    def add(self, inputs: Inputs, result: Inputs, expected: Inputs) -> None:
        """Account for one run."""
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
        if len(self.first) < FLOAT64_RUNS:
            self.first.append((inputs, result, expected))
        self.runs += 1


def _judge(
    bundle: Bundle,
    runner: str,
    samples: Samples,
    tally: _Tally,
    reference: Reference | None,
    min_snr_db: float | None,
    max_top1_drop: float | None,
) -> Report:
    floor = FLOORS_DB[bundle.recipe.format] if min_snr_db is None else min_snr_db
    below = [name for name, d in tally.distances.items() if d.snr_db < floor]
    against64: dict[str, tuple[float, float]] = {}
    failures: list[str] = []
    if below and min_snr_db is None:
        try:
            against64 = _against_float64(tally, reference or find_reference(bundle), below)
        except Exception as error:  # any operator may lack a float64 evaluation
            failures.append(
                f"no float64 run to judge amplification by: {' '.join(str(error).split())}"
            )
    for name in below:
        if name not in against64:
            failures.append(
                f"{name}: SNR {db_text(tally.distances[name].snr_db)} dB is below {floor:g}"
            )
        elif against64[name][0] < against64[name][1] - AMPLIFICATION_MARGIN_DB:
            failures.append(
                f"{name}: SNR {db_text(tally.distances[name].snr_db)} dB is below {floor:g}, and "
                f"{against64[name][1] - against64[name][0]:.1f} dB further from a float64 run than "
                "ONNX Runtime is"
            )
    accuracy = (tally.accuracy.top1, tally.reference_accuracy.top1) if tally.rows else (None, None)
    if max_top1_drop is not None:
        failures += _top1_failures(tally, max_top1_drop)
    outputs = tuple(
        OutputReport(
            name,
            d.snr_db,
            d.cosine,
            d.max_abs,
            d.top1_agreement,
            *against64.get(name, (None, None)),
        )
        for name, d in tally.distances.items()
    )
    return Report(
        bundle=bundle.path.name,
        runner=runner,
        data=samples.description,
        synthetic=samples.synthetic,
        runs=tally.runs,
        outputs=outputs,
        min_snr_db=floor,
        accuracy=accuracy[0],
        reference_accuracy=accuracy[1],
        max_top1_drop=max_top1_drop,
        failures=() if not below and not failures else tuple(failures),
    )


def _top1_failures(tally: _Tally, limit: float) -> list[str]:
    if tally.rows:
        drop = 100 * (tally.reference_accuracy.top1 - tally.accuracy.top1)
        lost = [f"accuracy drops by {drop:.2f} points, more than {limit:g}"]
        return lost if drop > limit else []
    shares = {
        n: d.top1_agreement for n, d in tally.distances.items() if d.top1_agreement is not None
    }
    if not shares:
        raise UserError(
            "no output has classes [batch, classes ≥ 2]",
            where="--max-top1-drop",
            fix="use --min-snr-db",
        )
    return [
        f"{name}: another winner in {100 * (1 - share):.2f} % of rows, more than {limit:g}"
        for name, share in shares.items()
        if 100 * (1 - share) > limit
    ]


def _against_float64(
    tally: _Tally, reference: Reference, names: list[str]
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
