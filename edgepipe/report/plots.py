"""Plots as SVG text that takes its ink from the page, so that one file serves light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from edgepipe.errors import UserError
from edgepipe.report.facts import Facts

_INK = "#010203"  # stands for the page's own colour until the text is written
#: Readable on white and on near-black, and apart from each other for colour-blind readers.
COLOURS = ("#2a78d6", "#d95f02", "#1b9e77", "#c2478d", "#8a6fd1", "#a6761d", "#4d9fb3", "#888888")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def trade_off(bundles: Sequence[Facts]) -> str:
    """Accuracy (SNR where there are no labels) over latency, the Pareto front joined; "" where
    fewer than two bundles were timed on their device."""
    labelled = all(f.accuracy is not None for f in bundles if f.latency_ms is not None)
    points = []
    for i, f in enumerate(bundles):
        quality = 100 * (f.accuracy or 0) if labelled else f.snr_db
        if f.latency_ms is not None and quality is not None:
            points.append((f.latency_ms, min(quality, 200.0), i))
    if len(points) < 2:
        return ""
    figure, axes = _figure(4.2 + 0.22 * len(points))
    for x, y, i in points:
        axes.plot([x], [y], _MARKS[i % 8], color=COLOURS[i % 8], ms=9, label=bundles[i].name)
    front = pareto([(x, y) for x, y, _ in points])
    axes.plot([x for x, _ in front], [y for _, y in front], color=_INK, lw=1, ls=":", zorder=0)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("top-1 accuracy, %" if labelled else "SNR against the original, dB")
    axes.margins(0.12)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, labelcolor=_INK)
    return _svg(figure, "trade-off")


def sizes(bundles: Sequence[Facts]) -> str:
    """Code, weights and arena of each bundle, in KB."""
    figure, axes = _figure(1.6 + 0.45 * len(bundles))
    names, left = [f.name for f in bundles], [0.0] * len(bundles)
    for part, colour in zip(("code", "weights", "arena"), COLOURS, strict=False):
        kib = [getattr(f, f"{part}_bytes") / 1024 for f in bundles]
        axes.barh(names, kib, left=left, color=colour, label=part, height=0.6)
        left = [a + b for a, b in zip(left, kib, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("KB")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=_INK)
    return _svg(figure, "sizes")


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other beats in both: less latency (first) and more quality (second)."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _figure(height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed", where="report",
                        fix="pip install 'edgepipe[report]'") from None  # fmt: skip
    # Narrow, so that text is readable where the plot is as wide as a phone.
    figure = Figure(figsize=(4.8, height), layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    axes.tick_params(colors=_INK)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK)
    for side, spine in axes.spines.items():
        spine.set_color(_INK)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def _svg(figure: Any, name: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # Text stays text; ids are the plot's own, as several share one page.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace(_INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'id="(\w+?)(_\d+)?"', rf'id="{name}-\1\2"', text)
    text = re.sub(r'(url\(#|href="#)(\w)', rf"\1{name}-\2", text)
    return re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" '
                  rf'aria-label="{name}" xmlns:xlink="http://www.w3.org/1999/xlink">', text,
                  count=1)  # fmt: skip
