"""The report: one HTML file that needs nothing else, for a screen, a phone and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edgepipe.display import db_text, size_text
from edgepipe.machine import machine, one_line, versions
from edgepipe.report import plots
from edgepipe.report.facts import Facts

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --back: #fff; --soft: #5b6470; --line: #d8dce2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --back: #16181c; --soft: #9aa3ad; --line: #363b42; } }
@media print { :root { --ink: #000; --back: #fff; --soft: #444; --line: #bbb; }
  section { break-inside: avoid; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; max-width: 46rem; height: auto; font-family: system-ui, sans-serif; }
.soft { color: var(--soft); }
"""
_HEADERS = ("bundle", "target", "recipe", "accuracy", "float accuracy", "SNR dB", "median ms",
            "90 % within", "99 % within", "code", "weights", "arena")  # fmt: skip


def render(bundles: Sequence[Facts]) -> str:
    """The page as text. Raises UserError without matplotlib."""
    title = ", ".join(dict.fromkeys(f.network for f in bundles))
    scatter = plots.trade_off(bundles)
    without = "Fewer than two of these bundles were timed on their device, so there is no plot."
    parts = [
        ("Results", _table(_HEADERS, [_row(f) for f in bundles]) + _remarks(bundles)),
        ("Quality and latency", scatter or f"<p>{without}</p>"),
        ("Sizes", plots.sizes(bundles)),
        ("What executes it", "".join(map(_kernels, bundles))),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in parts)
    conditions = escape(f"{one_line(machine())}; {one_line(versions('edgepipe', 'onnxruntime'))}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>"
        f'<body><h1>{escape(title)}</h1><p class="soft">{conditions}</p>{body}</body></html>\n'
    )


def _row(f: Facts) -> list[str]:
    reference = f.quality.reference_accuracy if f.quality else None
    timed = f.timing if f.latency_ms is not None else None
    times = (timed.p50_ms, timed.p90_ms, timed.p99_ms) if timed else (None, None, None)
    return [
        f.name, f.target, f.recipe, _percent(f.accuracy), _percent(reference),
        "–" if f.snr_db is None else db_text(f.snr_db),
        *("–" if t is None else f"{t:.3f}" for t in times),
        *(size_text(n) for n in (f.code_bytes, f.weights_bytes, f.arena_bytes)),
    ]  # fmt: skip


def _remarks(bundles: Sequence[Facts]) -> str:
    lines = [f"{f.name}: not run: {f.why_not}" for f in bundles if f.why_not]
    for f in bundles:
        if f.timing and f.timing.emulated:
            lines.append(f"{f.name}: run in an emulator, whose times say nothing of the device")
        if f.quality and not f.quality.ok:
            lines.append(f"{f.name}: validation failed: {'; '.join(f.quality.failures)}")
    data = dict.fromkeys(f.quality.data for f in bundles if f.quality)
    engines = dict.fromkeys(f.timing.engine for f in bundles if f.latency_ms and f.timing)
    lines += [f"data: {name}" for name in data] + [f"timed on: {name}" for name in engines]
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)


def _kernels(f: Facts) -> str:
    share = 100 / max(f.macs, 1)
    rows = [[k["op"].split(";")[0], k["op_type"], k["kernel"], k["arithmetic"], k["accumulator"],
             f"{k['macs'] * share:.1f}"] for k in f.kernels]  # fmt: skip
    headers = ("operator", "type", "kernel", "arithmetic", "accumulator", "% of MACs")
    return f"<details><summary>{escape(f.name)}</summary>{_table(headers, rows)}</details>"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
