"""The report: one HTML file that needs nothing else, for a screen, a phone and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from edgepipe.display import db_text, size_text
from edgepipe.machine import machine, one_line, versions
from edgepipe.report import operators, plots
from edgepipe.report.facts import Facts, slower

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --back: #fff; --soft: #5b6470; --line: #d8dce2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --back: #16181c; --soft: #9aa3ad; --line: #363b42; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin-top: 2rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .7rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plots { display: grid; gap: 1rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; max-width: 34rem; }
figcaption { color: var(--soft); font-size: .9rem; line-height: 1.35; }
svg { width: 100%; height: auto; font-family: system-ui, sans-serif; }
.soft { color: var(--soft); }
@media print { :root { color-scheme: light; --ink: #000; --back: #fff; --soft: #444; --line: #bbb; }
  @page { margin: 12mm; }
  body { font-size: 9pt; padding: 0; } h2 { break-after: avoid; } details { display: none; }
  figure, tr { break-inside: avoid; } .wide { overflow: visible; }
  .plots { grid-template-columns: 1fr 1fr; } th, td { padding: .15rem .3rem; font-size: 7pt;
    white-space: normal; } }
"""
_HEADERS = ("bundle", "target", "recipe", "accuracy", "float accuracy", "SNR dB", "median ms",
            "90 % within", "99 % within", "code", "weights", "arena")  # fmt: skip
_PEERS = ("bundle", "engine", "median ms", "lowest", "highest", "edgepipe takes", "same, dB")
_KERNELS = ("operator", "type", "kernel", "arithmetic", "accumulator", "% of MACs")
_TIMES = ("µs", "%", "warm µs", "GOP/s", "% of peak", "GB/s", "% of copy")
_LAYERS = ("layer", "type", "weight bits", "SNR dB", "loss dB", "cut off", "codes used")


def render(bundles: Sequence[Facts]) -> str:
    """The page as text. Raises UserError without matplotlib."""
    title = ", ".join(dict.fromkeys(f.network for f in bundles))
    parts = [
        ("Results", _table(_HEADERS, [_row(f) for f in bundles]) + _remarks(bundles)),
        ("Beside other engines", _peers(bundles)),
        ("Bundles beside each other", _side_by_side(bundles)),
        *((f.name, _bundle(f, i)) for i, f in enumerate(bundles)),
    ]
    body = "".join(
        f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in parts if content
    )
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
    times = (f.latency_ms, timed.p90_ms, timed.p99_ms) if timed else (None, None, None)
    return [
        f.name, f.target, f.recipe, _percent(f.accuracy), _percent(reference),
        "–" if f.snr_db is None else db_text(f.snr_db),
        *("–" if t is None else f"{t:.3f}" for t in times),
        *(size_text(n) for n in (f.code_bytes, f.weights_bytes, f.arena_bytes)),
    ]  # fmt: skip


def _remarks(bundles: Sequence[Facts]) -> str:
    lines = [f"{f.name}: {f.why_not}" for f in bundles if f.why_not]
    for f in bundles:
        if f.timing and f.timing.emulated:
            lines.append(f"{f.name}: run in an emulator, whose times say nothing of the device")
        if f.quality and not f.quality.ok:
            lines.append(f"{f.name}: validation failed: {'; '.join(f.quality.failures)}")
    lines += slower(bundles)
    data = dict.fromkeys(f.quality.data for f in bundles if f.quality)
    engines = dict.fromkeys(f.timing.engine for f in bundles if f.latency_ms and f.timing)
    lines += [f"data: {name}" for name in data] + [f"timed on: {name}" for name in engines]
    return "".join(f'<p class="soft">{escape(line)}</p>' for line in lines)


def _peers(bundles: Sequence[Facts]) -> str:
    """Engines that took turns with a bundle, "" where none did."""
    rows = []
    for f in bundles:
        if f.benchmark is None or not f.benchmark.ratios:
            continue
        rows += [
            [f.name, p.engine, *(f"{v:.3f}" for v in (p.median_ms, p.low_ms, p.high_ms)),
             f"{f.benchmark.ratios[p.engine]:.2f} ×",
             "–" if p.snr_db is None else db_text(p.snr_db)]
            for p in f.benchmark.peers
        ]  # fmt: skip
    note = "Each took turns with the bundle in one run, on as many threads; medians of rounds."
    return _table(_PEERS, rows) + f'<p class="soft">{note}</p>' if rows else ""


def _side_by_side(bundles: Sequence[Facts]) -> str:
    missing = "Fewer than two of these bundles were timed on their device: no trade-off to plot."
    shown = [
        ("Quality over latency; the dotted line joins what nothing else beats",
         plots.trade_off(bundles)),
        ("Efficiency gap: what the operations alone would take at the core's measured peak, and "
         "what an inference takes", plots.efficiency_gap(bundles)),
        ("Sizes", plots.sizes(bundles)),
    ]  # fmt: skip
    note = "" if shown[0][1] else f'<p class="soft">{missing}</p>'
    return note + _figures([(caption, plot) for caption, plot in shown if plot])


def _bundle(f: Facts, index: int) -> str:
    tables = [("What executes it", _kernels(f))]
    if f.layers is not None:
        tables.append(("Layers against the float network", _layers(f)))
    details = "".join(
        f"<details><summary>{name}</summary>{table}</details>" for name, table in tables
    )
    return _figures(operators.plots_of(f, index)) + details


def _figures(shown: Sequence[tuple[str, str]]) -> str:
    figures = "".join(
        f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, plot in shown
    )
    return f'<div class="plots">{figures}</div>'


def _kernels(f: Facts) -> str:
    """Every operator, and what it takes where that was measured."""
    share = 100 / max(f.macs, 1)
    rows = [[k["op"].split(";")[0], k["op_type"], k["kernel"], k["arithmetic"], k["accumulator"],
             f"{k['macs'] * share:.1f}"] for k in f.kernels]  # fmt: skip
    if f.profile is None:
        return _table(_KERNELS, rows)
    whole = sum(op.us for op in f.profile.ops) or 1.0
    for row, op in zip(rows, f.profile.ops, strict=True):
        row += [f"{op.us:.2f}", f"{100 * op.us / whole:.1f}", f"{op.warm_us:.2f}",
                f"{op.per_s / 1e9:.1f}", _share(op.of_peak), f"{op.bytes_per_s / 1e9:.1f}",
                _share(op.of_copy)]  # fmt: skip
    return _table((*_KERNELS, *_TIMES), rows)


def _layers(f: Facts) -> str:
    assert f.layers is not None
    rows = [[x.layer, x.op_type, "–" if x.weight_bits is None else str(x.weight_bits),
             db_text(x.snr_db), "–" if x.loss_db is None else f"{x.loss_db:.1f}",
             _percent(x.saturation), _percent(x.codes_used)] for x in f.layers.layers]  # fmt: skip
    return _table(_LAYERS, rows)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"
