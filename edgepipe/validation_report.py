"""What a validation found, as a value, as text and as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from edgepipe.display import db_text, table


@dataclass(frozen=True)
class OutputReport:
    """One output against the float reference. ``snr64_db`` and ``reference_snr64_db`` are the
    bundle's and ONNX Runtime's SNR against a float64 run, where that was needed."""

    name: str
    snr_db: float
    cosine: float
    max_abs: float
    top1_agreement: float | None
    snr64_db: float | None = None
    reference_snr64_db: float | None = None


@dataclass(frozen=True)
class StepReport:
    """One output of a quantized bundle against the Q/DQ model. ``step`` is the distance of two
    codes of the output (see docs/validation.md), ``within_one`` the share of values at most one
    step off (0…1), ``max_steps`` the largest distance."""

    name: str
    step: float
    within_one: float
    max_steps: float
    snr_db: float


@dataclass(frozen=True)
class Report:
    """The result of a validation. ``accuracy`` and ``reference_accuracy`` are top-1 in 0…1.

    ``outputs`` compares with the float model, or with the Q/DQ file where that is the original;
    ``steps`` compares a quantized bundle with its Q/DQ model, on ``steps_data``; where ONNX Runtime
    is too far from it, ``integer_steps`` compares the first runs with the integers by definition,
    and ``reference_steps`` ONNX Runtime with those.
    """

    bundle: str
    runner: str
    data: str
    synthetic: bool
    runs: int
    outputs: tuple[OutputReport, ...]
    min_snr_db: float | None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    max_top1_drop: float | None = None
    failures: tuple[str, ...] = ()
    steps: tuple[StepReport, ...] = ()
    steps_data: str | None = None
    integer_steps: tuple[StepReport, ...] = ()
    reference_steps: tuple[StepReport, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every output is above its floor."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """The report for ``json.dumps``; infinities are the strings "inf" and "-inf"."""
        fields: dict[str, Any] = plain(asdict(self))
        return {"ok": self.ok, **fields}

    def __str__(self) -> str:
        synthetic = " – synthetic: says nothing of accuracy" if self.synthetic else ""
        lines = [f"{self.bundle} by {self.runner}, against ONNX Runtime"]
        lines.append(f"data: {self.data}{synthetic}")
        if self.steps:
            lines += ["", *self._step_lines()]
        if self.outputs:
            lines += ["", *self._output_lines()]
        if self.accuracy is not None and self.reference_accuracy is not None:
            lines.append(
                f"accuracy: bundle {100 * self.accuracy:.2f} %, "
                f"ONNX Runtime {100 * self.reference_accuracy:.2f} %"
            )
        ended = [f"FAILED  {text}" for text in self.failures] or ["ok"]
        return "\n".join([*lines, "", *ended])

    def _step_lines(self) -> list[str]:
        where = "" if self.steps_data in (None, self.data) else f", on {self.steps_data}"
        lines = [f"arithmetic, against the Q/DQ model{where}:", _step_table(self.steps)]
        if self.integer_steps:
            lines += ["", "the first runs, against its integers by definition:"]
            lines.append(_step_table(self.integer_steps))
            lines += ["", "ONNX Runtime on the Q/DQ model, against the same:"]
            lines.append(_step_table(self.reference_steps))
        return lines

    def _output_lines(self) -> list[str]:
        agreements = [o.top1_agreement for o in self.outputs]
        rows = [
            [o.name, db_text(o.snr_db), f"{o.cosine:.9f}", f"{o.max_abs:.3g}",
             "–" if agreement is None else share(agreement)]
            for o, agreement in zip(self.outputs, agreements, strict=True)
        ]  # fmt: skip
        lines = ["accuracy, against the original model:"] if self.steps else []
        lines.append(table(["output", "SNR dB", "cosine", "max abs", "top-1 agreement"], rows))
        for o in self.outputs:
            if o.snr64_db is not None and o.reference_snr64_db is not None:
                lines.append(
                    f"{o.name} against float64: bundle {db_text(o.snr64_db)} dB, "
                    f"ONNX Runtime {db_text(o.reference_snr64_db)} dB"
                )
        return lines


def _step_table(steps: tuple[StepReport, ...]) -> str:
    rows = [
        [s.name, f"{s.step:.3g}", share(s.within_one), f"{s.max_steps:.3g}", db_text(s.snr_db)]
        for s in steps
    ]
    return table(["output", "step", "within 1 step", "max steps", "SNR dB"], rows)


def plain(value: Any) -> Any:
    """``value`` for ``json.dumps``: tuples as lists, infinities and NaN as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def share(value: float) -> str:
    """A share of 0…1 in percent."""
    return f"{100 * value:.2f} %"
