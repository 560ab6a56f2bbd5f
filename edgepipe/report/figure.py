"""Figures as SVG text that takes its ink from the page, so that one file serves light and dark."""

from __future__ import annotations

import io
import re
from typing import Any

from edgepipe.errors import UserError

INK = "#010203"  # stands for the page's own colour until the text is written
#: Readable on white and on near-black, and apart from each other for colour-blind readers.
COLOURS = ("#2a78d6", "#d95f02", "#1b9e77", "#c2478d", "#8a6fd1", "#a6761d", "#4d9fb3", "#888888")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figure(height: float) -> tuple[Any, Any]:
    """A figure of ``height`` inches and its axes. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed", where="report",
                        fix="pip install 'edgepipe[report]'") from None  # fmt: skip
    # Narrow, so that text is readable where the plot is as wide as a phone.
    made = Figure(figsize=(4.8, height), layout="constrained")
    axes = made.subplots()
    axes.patch.set_alpha(0)
    made.patch.set_alpha(0)
    axes.tick_params(colors=INK, which="both")
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))
    return made, axes


def legend(made: Any, columns: int = 1) -> None:
    """The names of what was plotted, below the axes."""
    made.legend(loc="outside lower center", ncols=columns, frameon=False, labelcolor=INK,
                columnspacing=1.2, handletextpad=0.5)  # fmt: skip


def svg(made: Any, name: str) -> str:
    """The figure as SVG. ``name`` tells its ids from those of others on the page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    # Text stays text.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}):
        made.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'id="(\w+?)(_\d+)?"', rf'id="{name}-\1\2"', text)
    text = re.sub(r'(url\(#|href="#)(\w)', rf"\1{name}-\2", text)
    # A hundredth of a point is enough for a path.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    return re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" '
                  rf'aria-label="{name}" xmlns:xlink="http://www.w3.org/1999/xlink">', text,
                  count=1)  # fmt: skip
