"""Bundles beside each other: quality over latency, the efficiency gap, sizes."""

from __future__ import annotations

from collections.abc import Sequence

from edgepipe.report.facts import Facts
from edgepipe.report.figure import COLOURS, INK, MARKS, figure, legend, svg

#: An exact output has no noise and an infinite SNR; in a plot it is this high.
_EXACT_DB = 200.0


def trade_off(bundles: Sequence[Facts]) -> str:
    """Accuracy (SNR where there are no labels) over latency, the Pareto front joined; "" where
    fewer than two bundles were timed on their device."""
    timed = [f for f in bundles if f.latency_ms is not None]
    values = _quality(timed)
    points = [(f.latency_ms or 0.0, y, bundles.index(f)) for f, y in zip(timed, values, strict=True)
              if y is not None]  # fmt: skip
    if len(points) < 2:
        return ""
    made, axes = figure(3.4 + 0.22 * len(points))
    for x, y, i in points:
        axes.plot([x], [y], MARKS[i % 8], color=COLOURS[i % 8], ms=9, label=bundles[i].name)
    front = pareto([(x, y) for x, y, _ in points])
    axes.plot([x for x, _ in front], [y for _, y in front], color=INK, lw=1, ls=":", zorder=0)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel(_quality_label(timed))
    axes.margins(0.12)
    legend(made)
    return svg(made, "trade-off")


def efficiency_gap(bundles: Sequence[Facts]) -> str:
    """Quality over measured latency and over what the operations would take at the core's peak,
    the two joined (Lavin, On the Efficiency of Convolutional Neural Networks, 2024); "" without a
    profile. Without any quality bundles stand one above the other."""
    shown = [f for f in bundles if f.profile is not None and f.profile.ideal_us > 0]
    if not shown:
        return ""
    values = _quality(shown)
    if any(v is None for v in values):
        values = [float(-i) for i in range(len(shown))]
    made, axes = figure(3.0 + 0.22 * len(shown))
    for f, y in zip(shown, values, strict=True):
        assert f.profile is not None
        i = bundles.index(f)
        ideal, real = f.profile.ideal_us / 1e3, f.profile.inference_us / 1e3
        axes.plot([ideal, real], [y, y], color=COLOURS[i % 8], lw=1.2)
        axes.plot([ideal], [y], MARKS[i % 8], color=COLOURS[i % 8], ms=8, mfc="none")
        axes.plot([real], [y], MARKS[i % 8], color=COLOURS[i % 8], ms=9,
                  label=f"{f.name}: {100 * f.profile.efficiency:.0f} %")  # fmt: skip
    axes.set_xscale("log")
    _plain_log(axes)
    axes.set_xlabel("ms: at the core's peak (hollow), measured")
    if values and values[0] is not None and min(v or 0 for v in values) > 0:
        axes.set_ylabel(_quality_label(shown))
    else:
        axes.set_yticks([])
    axes.margins(0.12)
    legend(made)
    return svg(made, "efficiency-gap")


def sizes(bundles: Sequence[Facts]) -> str:
    """Code, weights and arena of each bundle, in KB."""
    made, axes = figure(1.6 + 0.45 * len(bundles))
    names, left = [f.name for f in bundles], [0.0] * len(bundles)
    for part, colour in zip(("code", "weights", "arena"), COLOURS, strict=False):
        kib = [getattr(f, f"{part}_bytes") / 1024 for f in bundles]
        axes.barh(names, kib, left=left, color=colour, label=part, height=0.6)
        left = [a + b for a, b in zip(left, kib, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("KB")
    legend(made, 3)
    return svg(made, "sizes")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both: less latency (first) and more quality (second)."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _labelled(bundles: Sequence[Facts]) -> bool:
    return all(f.accuracy is not None for f in bundles)


def _quality(bundles: Sequence[Facts]) -> list[float | None]:
    """Accuracy in percent where all have labels, else SNR in dB."""
    if _labelled(bundles):
        return [100 * (f.accuracy or 0.0) for f in bundles]
    return [None if f.snr_db is None else min(f.snr_db, _EXACT_DB) for f in bundles]


def _quality_label(bundles: Sequence[Facts]) -> str:
    return "top-1 accuracy, %" if _labelled(bundles) else "SNR against the original, dB"


def _plain_log(axes: object) -> None:
    """A few plain numbers instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis  # type: ignore[attr-defined]
    axis.set_major_locator(LogLocator(base=10, subs=(1, 3), numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_formatter(NullFormatter())
